"""The paper's experiments and their controls: `python -m flwr_cloned_kd.paper`."""
