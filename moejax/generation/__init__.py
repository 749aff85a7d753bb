"""Writing text with a trained model: one token after the other, with what was read kept."""
