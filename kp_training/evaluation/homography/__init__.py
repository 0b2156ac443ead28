"""Evaluation on image pairs with known homographies."""
