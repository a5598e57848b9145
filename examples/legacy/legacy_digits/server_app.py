"""The server: LegacyClonedKD where a legacy FedAvg was."""

from flwr.app import Context
from flwr.server import ServerAppComponents, ServerConfig
from flwr.serverapp import ServerApp

from flwr_cloned_kd import Core, LegacyClonedKD, Recipe, digits_cnn, practical
from legacy_digits.task import load_part, load_test


def print_round(row):
    print(f"round {row['round']}: edge {row['edge']}, core accuracy {row.get('core-accuracy')}")


def server_fn(context: Context) -> ServerAppComponents:
    config = context.run_config
    core = Core(
        model=digits_cnn(),
        dataset=load_part(0, int(config["num-edges"])),
        held_out=load_test(),
        recipe=Recipe(epochs=int(config["core-epochs"])),
        distillation=practical(Recipe(epochs=int(config["distill-epochs"]))),
    )
    strategy = LegacyClonedKD(
        core,
        core.pretrain(),
        num_clones=int(config["num-clones"]),
        timeout=60,
        on_round=print_round,
    )
    server_config = ServerConfig(num_rounds=int(config["num-server-rounds"]))
    return ServerAppComponents(strategy=strategy, config=server_config)


app = ServerApp(server_fn=server_fn)
