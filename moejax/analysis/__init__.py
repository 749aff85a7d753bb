"""What is measured of routers outside of training.

Of traces, each in a file of its own, beside chance and a shuffled control: `load`, `domains`,
`vocabulary`, `coactivation`, `repetition`, `predictability`, `saturation`; `measures` makes them in
one pass. `ablation` takes experts away, `gradients` judges a router's gradient.
"""
