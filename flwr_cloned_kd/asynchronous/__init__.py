"""Flower's strategy loop without the barrier at the end of a round."""
