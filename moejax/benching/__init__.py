"""What `moejax bench` measures: the layer and the training step, beside a dense network."""
