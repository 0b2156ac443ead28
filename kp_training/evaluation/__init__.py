"""How good features are, measured: any method on Middlebury's scenes."""
