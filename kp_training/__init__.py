"""Training and evaluation of the networks that kp_frontend runs."""
