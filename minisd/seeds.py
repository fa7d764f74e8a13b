"""Seeds and generators: where the noise of each image comes from."""

import secrets

import torch

from minisd import checks

# torch's CPU generator reads only 32 bits of a seed: larger ones would repeat smaller ones.
MAX_SEED = 2**32 - 1


def generators_of(count: int, seed: object, generator: object) -> list[torch.Generator]:
    """One torch generator for each of ``count`` images, from a seed or from the caller's own."""
    if generator is not None:
        if seed is not None:
            raise ValueError("give either seed or generator, not both")
        given = list(generator) if isinstance(generator, (list, tuple)) else [generator] * count
        generators = [g for g in given if isinstance(g, torch.Generator)]
        if len(generators) != len(given):
            raise TypeError("generator must be a torch.Generator or a list of them")
        if len(given) != count:
            raise ValueError(f"there are {count} images but {len(given)} generators")
        return generators
    # On the CPU whatever the device, so that a seed is the same image everywhere.
    return [torch.Generator("cpu").manual_seed(s) for s in _seeds(count, seed)]


def known_seeds(generators: list[torch.Generator]) -> list[int | None]:
    """The seed that makes an image again; None for a generator that has drawn already, that draws
    for an earlier image, or that is no CPU's."""
    seeds: list[int | None] = []
    for i, g in enumerate(generators):
        seed = g.initial_seed()
        known = g.device.type == "cpu" and seed <= MAX_SEED and g not in generators[:i]
        fresh = known and torch.equal(
            g.get_state(), torch.Generator("cpu").manual_seed(seed).get_state())
        seeds.append(seed if fresh else None)
    return seeds


def _seeds(count: int, seed: object) -> list[int]:
    """The seed of each image: seed, seed + 1, ...; as listed; or drawn where there is none."""
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise ValueError(f"there are {count} images but {len(seed)} seeds")
        return [checks.integer(f"seed[{i}]", s, 0, MAX_SEED) for i, s in enumerate(seed)]
    if seed is None:
        seed = secrets.randbelow(MAX_SEED - count + 2)
    first = checks.integer("seed", seed, 0, MAX_SEED)
    if first + count - 1 > MAX_SEED:
        raise ValueError(f"seed {first} + {count - 1} for the last image is past {MAX_SEED}")
    return [first + i for i in range(count)]
