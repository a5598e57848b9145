"""The core: Phase 0, then one edge after the other."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flwr_cloned_kd.apps import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, context)
