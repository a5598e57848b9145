"""The edges: a client app with its own training loop, to which one mod gives clones."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_cloned_kd import fold_in, in_wire_dtype, train_clones
from own_training_loop import task

app = ClientApp(mods=[in_wire_dtype, train_clones()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one model on the data of this edge. The mod calls the function once per clone."""
    settings = context.run_config
    config = message.content["config"]
    # FedAvg sends no seed.
    own_seed = fold_in(int(settings["seed"]), int(config["server-round"]))
    torch.manual_seed(config.get("seed", own_seed))
    model = task.Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    edge = int(context.node_config["partition-id"])
    dataset = task.load_part(1 + edge, int(settings["num-edges"]), int(settings["seed"]))
    loss = task.train(model, dataset, int(settings["edge-epochs"]))
    metrics = MetricRecord({"loss": loss, "num-examples": len(dataset[1])})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Return the name of this edge, by which the server recognises it."""
    config = ConfigRecord({"edge": str(context.node_config["partition-id"])})
    return Message(RecordDict({"config": config}), reply_to=message)
