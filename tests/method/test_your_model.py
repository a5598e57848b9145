"""Models, data and tasks that users bring: each of them goes through all three phases."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from flwr_cloned_kd import (
    Classification,
    Core,
    Distillation,
    EdgeClient,
    Recipe,
    Regression,
    Runtime,
    SeveralLabels,
    correct,
    fold_in,
    label_probability,
    member,
    practical,
    train_edge,
)
from flwr_cloned_kd.engine.ensemble import seeded
from tests.helpers import reference
from tests.helpers.cores import make_core, start_of
from tests.helpers.reference import ROUNDING, distance, images, mlp, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(epochs=8, batch_size=8, lr=0.05)


class Returns(nn.Module):
    """Wraps the outputs of a model in another form."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.model = mlp()

    def forward(self, x):
        return self.form(self.model(x))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class NextToken(nn.Module):
    """A transformer that sees the tokens before each place; called with a dict of inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 6)

    def forward(self, input_ids, attention_mask):
        length = input_ids.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        hidden = self.layer(self.embed(input_ids), later, attention_mask == 0)
        return SimpleNamespace(logits=self.head(hidden))


def tokens(num_samples=32, length=7, seed=0):
    """Make texts in which each token is the one before plus one; the last places are padding."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(6, (num_samples, 1), generator=generator)
    ids = (first + torch.arange(length + 1)) % 6
    mask = torch.arange(length) < torch.randint(
        3, length + 1, (num_samples, 1), generator=generator
    )
    labels = torch.where(mask, ids[:, 1:], -100)
    return {"input_ids": ids[:, :-1], "attention_mask": mask.long()}, labels


def table(num_samples=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_samples, 5, generator=generator)
    return rows, (rows[:, 0] > 0).long() + (rows[:, 1] > 0).long()


def words(num_samples=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, (num_samples, 4), generator=generator)
    return ids, ids[:, -1] % 3


def several(num_samples=32, seed=0):
    rows, _ = table(num_samples, seed)
    return rows, (rows[:, :3] > 0).long()


def numbers(num_samples=32, seed=0):
    rows, _ = table(num_samples, seed)
    return rows, (rows[:, :2] @ torch.tensor([[1.0, 0.5], [-1.0, 2.0]]))


def shapes(num_samples=32, seed=0):
    """Make grey images whose bright pixels are class 1; the border of one pixel is ignored."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num_samples, 1, 6, 6, generator=generator)
    labels = torch.full((num_samples, 6, 6), 255)
    labels[:, 1:-1, 1:-1] = (pixels[:, 0, 1:-1, 1:-1] > 0).long()
    return pixels, labels


def small(*layers):
    return seeded(nn.Sequential(*layers), 0)


def digits(num_samples=32, seed=0):
    return images(num_samples, seed=seed)


TOKENS = Classification(ignore_index=-100)
PIXELS = Classification(class_axis=-3, ignore_index=255)
NUMBERS = Regression(tolerance=0.5)
TRIALS = {
    "a TensorDataset": (mlp, lambda **of: TensorDataset(*digits(**of)), Classification()),
    "NumPy arrays": (mlp, lambda **of: tuple(t.numpy() for t in digits(**of)), Classification()),
    "float64 inputs": (
        mlp,
        lambda **of: (digits(**of)[0].double(), digits(**of)[1]),
        Classification(),
    ),
    "a dict of logits": (lambda: Returns(lambda x: {"logits": x}), digits, Classification()),
    "an object with logits": (
        lambda: Returns(lambda x: SimpleNamespace(logits=x)),
        digits,
        Classification(),
    ),
    "tabular data": (
        lambda: small(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)),
        table,
        Classification(),
    ),
    "an EmbeddingBag": (
        lambda: small(nn.EmbeddingBag(6, 16), nn.Linear(16, 3)),
        words,
        Classification(),
    ),
    "an LSTM": (Lstm, words, Classification()),
    "next tokens": (NextToken, tokens, TOKENS),
    "segmentation": (lambda: small(nn.Conv2d(1, 2, 3, padding=1)), shapes, PIXELS),
    "several labels": (lambda: small(nn.Linear(5, 3)), several, SeveralLabels()),
    "regression": (lambda: small(nn.Linear(5, 2)), numbers, NUMBERS),
}
trials = pytest.mark.parametrize(("build", "data", "task"), TRIALS.values(), ids=TRIALS)


@trials
def test_every_trial_of_a_new_user_goes_through_all_phases(build, data, task):
    torch.manual_seed(0)
    model = build()
    core = Core(model=model, dataset=data(seed=1), held_out=data(seed=2), task=task, recipe=RECIPE)
    state = core.state(core.pretrain())
    edge = EdgeClient(model, data(seed=3), RECIPE, task=task)
    arrays = [tensor.numpy() for tensor in state.params.values()]
    replies, num_examples, _ = edge.fit(arrays, {"num-clones": 2, "seed": 5})
    ensemble = {name: torch.from_numpy(reply) for name, reply in zip(state.params, replies)}
    assert num_examples == 32
    after, metrics = core.distill(state, ensemble)
    names = ("core-accuracy", "edge-accuracy", "ensemble-accuracy", "consensus", "known")
    assert all(0 <= metrics[name] <= 1 for name in names)
    assert metrics["student-only"] + metrics["both"] == pytest.approx(metrics["core-accuracy"])
    # Each of these trials is easy: two phases of a few steps are better than no training.
    untrained = core.held_out_accuracy(dict(model.state_dict()))
    assert core.held_out_accuracy(after.params) == pytest.approx(metrics["core-accuracy"])
    assert metrics["core-accuracy"] > untrained + 0.1
    loss, num_examples, scores = edge.evaluate(
        [tensor.numpy() for tensor in after.params.values()], {}
    )
    assert loss >= 0
    assert num_examples == 32
    assert scores["accuracy"] > untrained


def textbook(task, outputs, labels, teacher, temperature):
    """Compute t^2 KL for each element that counts, for one teacher."""
    if isinstance(task, Regression):
        return (outputs - teacher) ** 2
    if isinstance(task, SeveralLabels):
        p, q = (teacher / temperature).sigmoid(), (outputs / temperature).sigmoid()
        return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    axis = task.class_axis
    p, q = ((part / temperature).log_softmax(axis) for part in (teacher, outputs))
    return temperature**2 * (p.exp() * (p - q)).sum(axis)


def loss_on_labels(task, outputs, labels):
    if isinstance(task, Regression):
        return (outputs - labels).square().mean()
    if isinstance(task, SeveralLabels):
        return F.binary_cross_entropy(outputs.sigmoid(), labels.float())
    index = -100 if task.ignore_index is None else task.ignore_index
    logits = outputs.movedim(task.class_axis, 1)
    return F.cross_entropy(logits, labels, ignore_index=index)


def is_right(task, ensemble, labels, temperature):
    """Say which elements the mean of an ensemble, a list of outputs, predicts correctly."""
    if isinstance(task, Regression):
        return (sum(ensemble) / len(ensemble) - labels).abs() <= task.tolerance
    if isinstance(task, SeveralLabels):
        mean = sum((outputs / temperature).sigmoid() for outputs in ensemble) / len(ensemble)
        return (mean > 0.5) == (labels > 0)
    axis = task.class_axis
    mean = sum((outputs / temperature).softmax(axis) for outputs in ensemble) / len(ensemble)
    return mean.argmax(axis) == labels


def twin_of_phase2(model, core, memory, dataset, task, distillation, *, seed):
    """Run Phase 2 as a plain loop with a separate term per teacher and per element."""
    teachers = [
        [reference._loaded(model, member(ensemble, e)) for e in range(2)] for ensemble in memory
    ]

    def loss(outputs, inputs, labels):
        total = loss_on_labels(task, outputs, labels)
        for ensemble in teachers:
            with torch.no_grad():
                predictions = [teacher(inputs) for teacher in ensemble]
            weights = torch.ones(labels.shape)
            if distillation.selection is not None:
                weights = is_right(task, predictions, labels, distillation.temperature).float()
            counts = labels == labels if task.ignore_index is None else labels != task.ignore_index
            for teacher in predictions:
                terms = textbook(task, outputs, labels, teacher, distillation.temperature)
                total = total + (weights * terms)[counts].mean() / 2
        return total

    return reference.train(
        model,
        core,
        dataset,
        distillation.recipe,
        seed=seed,
        loss=loss,
        view_seed=fold_in(0, "phase-2-views"),
    )


TASKS = ["segmentation", "several labels", "regression"]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("selection", [None, correct], ids=["all", "correct"])
@pytest.mark.parametrize("target_bytes", [0, 2**20])
def test_two_rounds_equal_a_plain_loop_over_separate_terms(name, selection, target_bytes):
    build, data, task = TRIALS[name]
    model, dataset = build(), data(num_samples=24, seed=1)
    recipe = Recipe(epochs=3, batch_size=8, lr=0.02)
    core = make_core(
        dataset,
        recipe,
        model,
        distillation={"selection": selection},
        task=task,
        runtime=Runtime(target_bytes=target_bytes),
    )
    state, params, memory = start_of(core), dict(model.state_dict()), []
    for version in range(2):
        edge = train_edge(
            model, params, data(num_samples=24, seed=7 + version), RECIPE, task=task, num_clones=2
        )
        memory.append(edge)
        state, _ = core.distill(state, edge)
        params = twin_of_phase2(
            model,
            params,
            memory,
            dataset,
            task,
            core.distillation,
            seed=fold_in(core.seed, "phase-2", version),
        )
        assert distance(state.params, params) < ROUNDING
    assert distance(params, dict(model.state_dict())) > 1e-2


def test_the_selection_of_the_practical_preset_is_that_of_the_task():
    build, data, task = TRIALS["regression"]
    results = []
    for selection in (correct, task.correct, None):
        core = make_core(data(), RECIPE, build(), distillation={"selection": selection}, task=task)
        edge = train_edge(core.model, core.model.state_dict(), data(seed=4), RECIPE, task=task)
        results.append(core.distill(start_of(core), edge)[0].params)
    assert same_bits(results[0], results[1])
    assert not same_bits(results[0], results[2])
    assert practical(RECIPE).selection is correct


def test_the_probability_of_a_label_is_no_selection_of_another_task():
    build, data, task = TRIALS["regression"]
    distillation = Distillation(selection=label_probability)
    with pytest.raises(ValueError, match="selection: expected correct, None or a function of your"):
        Core(model=build(), dataset=data(), task=task, distillation=distillation)


def test_a_guard_sees_which_text_a_token_belongs_to():
    seen = []
    data = tokens(num_samples=8)
    recipe = Recipe(epochs=1, batch_size=8)
    core = Core(model=NextToken(), dataset=data, recipe=recipe, task=TOKENS, guard=seen.append)
    edge = train_edge(core.model, core.model.state_dict(), data, recipe, task=TOKENS)
    core.distill(core.state(core.pretrain()), edge)
    lengths = (data[1] != -100).sum(1).tolist()
    assert seen[0].samples.tolist() == [i for i in range(8) for _ in range(lengths[i])]
    assert len(seen[0].samples) == len(seen[0].before)
    samples = digits(num_samples=8)
    core = Core(model=mlp(), dataset=samples, recipe=recipe, guard=seen.append)
    core.distill(
        core.state(core.pretrain()), train_edge(core.model, core.pretrain(), samples, recipe)
    )
    assert seen[-1].samples is None
