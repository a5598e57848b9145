from flwr_cloned_kd import VirtualGrid, accounts
from tests.helpers.scripted import W_BYTES, by_edge, nodes, run


def test_accounts_of_a_run_add_up():
    """The run of `test_a_timeline_derived_by_hand` in tests/virtual/test_grid.py."""
    grid = VirtualGrid(nodes(4), compute=by_edge(1, 5, 1, 1), core=2.0)
    sums = accounts(run(grid, rounds=4, max_in_flight=2).history)
    assert sums["bytes-down"] == sums["bytes-up"] == 4 * W_BYTES
    assert sums["bytes-per-edge"] == {str(1 + edge): [W_BYTES, W_BYTES] for edge in range(4)}
    assert sums["edge-seconds"] == 1 + 5 + 1 + 1
    # The core is busy from 1 to 9, 2 s for each answer.
    assert (sums["core-idle-seconds"], sums["core-seconds"]) == (1, 8)
    assert (sums["wait-seconds"], sums["edge-idle-seconds"]) == (5, 3)
    assert sums["staleness"] == {"0": 1, "1": 1, "2": 1, "3": 1}
