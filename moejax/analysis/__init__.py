"""What is measured of routers outside of training."""
