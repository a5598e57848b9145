"""Algorithm 1 of the paper on handwritten digits, without Flower."""

import argparse
from dataclasses import replace

from flwr_cloned_kd import (
    PRESETS,
    VARIANTS,
    Core,
    Recipe,
    digits_cnn,
    edge_seed,
    load_digits,
    partition,
    take,
    train_edge,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="CEM", help="row of Fig. 5")
    parser.add_argument(
        "--preset", choices=PRESETS, default="practical", help="settings of Phase 2"
    )
    parser.add_argument("--num-edges", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=30, help="epochs of Phases 1 and 2")
    parser.add_argument("--core-epochs", type=int, default=12, help="epochs of Phase 0")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    variant = VARIANTS[options.variant]
    recipe = Recipe(epochs=options.epochs)
    train, test = load_digits()
    core_part, *edge_parts = partition(len(train[1]), 1 + options.num_edges, seed=options.seed)
    distillation = PRESETS[options.preset](recipe)
    core = Core(
        model=digits_cnn(seed=options.seed),
        dataset=take(train, core_part),
        recipe=replace(recipe, epochs=options.core_epochs),
        distillation=replace(distillation, memory_size=variant.memory_size),
        held_out=test,
        seed=options.seed,
    )

    # PHASE 0: core initialization
    state = core.state(core.pretrain())
    print(f"first core {core.held_out_accuracy(state.params):.3f}")
    send = variant.init(core)

    # while edge E_{i+1} exists
    for i, edge_part in enumerate(edge_parts, start=1):
        # DOWNLINK: the core (or, for the I- variants, another model) goes to the edge
        sent = send(state)
        # PHASE 1: expedition and learning on edge
        ensemble = train_edge(
            core.model,
            sent,
            take(train, edge_part),
            recipe,
            num_clones=variant.num_clones,
            seed=edge_seed(core.seed, i),
        )
        # UPLINK and PHASE 2: knowledge distillation, with the temporal memory
        state, metrics = core.distill(state, ensemble, sent=sent)
        print(
            f"round {i}: edge {metrics['edge-accuracy']:.3f}, "
            f"ensemble {metrics['ensemble-accuracy']:.3f}, core {metrics['core-accuracy']:.3f}, "
            f"consensus {metrics['consensus']:.3f}"
        )


if __name__ == "__main__":
    main()
