"""The attacks for the evaluation, fixed before any detector was evaluated."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.attacks import AttackSpec
from ce_plugin.errors import unknown_name

__all__ = ["fit_suite", "suite"]

_STRETCH = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


def suite(name: str) -> tuple[AttackSpec, ...]:
    """The attacks of the evaluation, cheap ones first.

    Limits on steps, queries and the number of images are part of the settings. Perturbations of attacks that stop at
    the boundary are enlarged by the smallest factor that survives rounding to eight bits; bounded attacks are not.

    Args:
        name: ``"small"`` for pictures of 28 x 28 (eps 0.1 and 0.3), ``"imagenet"`` for photographs (2, 4, 8 / 255).

    Raises:
        UnknownNameError: an unknown suite.

    Example:
        >>> [spec.name for spec in suite("small")][:3]
        ['fgsm-0.1', 'fgsm-0.3', 'bim-0.1']
        >>> sum(spec.excluded for spec in suite("small"))
        2

    Source: Goodfellow et al. 2015 (FGSM); Kurakin et al. 2017 (BIM); Madry et al. 2018 (PGD); Moosavi-Dezfooli et al.
    2016 (DeepFool); Carlini and Wagner 2017; Papernot et al. 2016 (JSMA); Chen et al. 2018 (ElasticNet); Andriushchenko
    et al. 2020 (Square); Chen et al. 2020 (HopSkipJump); Su et al. 2019, Vargas et al. 2019 (pixels); Croce and Hein
    2020 (AutoAttack); Engstrom et al. 2019 (spatial); Brown et al. 2017 (patch). All as in ART.
    """
    if name not in _SUITES:
        raise unknown_name("name", name, _SUITES)
    return _SUITES[name]


def fit_suite(name: str) -> tuple[AttackSpec, ...]:
    """The attacks for fitting under P2: the FGSM attacks of a suite.

    Args:
        name: see :func:`suite`.

    Example:
        >>> [spec.name for spec in fit_suite("small")]
        ['fgsm-0.1', 'fgsm-0.3']
    """
    tries = {"small": 800, "imagenet": 450}
    return tuple(
        _sign(spec.name, spec.attack, spec.settings["eps"], tries[name], enough=tries[name], chunk=spec.chunk)
        for spec in suite(name)
        if spec.attack == "FastGradientMethod"
    )


def _sign(name: str, attack: str, eps: float, tries: int, enough: int, chunk: int, **settings: Any) -> AttackSpec:
    return AttackSpec(name, "sign", "linf", attack, {"eps": eps, **settings}, tries=tries, enough=enough, chunk=chunk)


def _bounded(bounds: dict[str, float], steps: tuple[int, int], tries: int, enough: int, chunk: int) -> list[AttackSpec]:
    """FGSM, BIM and PGD for each bound; the steps of BIM add up to 2 eps, those of PGD to 2.5 eps."""
    made = [_sign(f"fgsm-{words}", "FastGradientMethod", eps, tries, enough, chunk) for words, eps in bounds.items()]
    for words, eps in bounds.items():
        settings = {"eps_step": 2 * eps / steps[0], "max_iter": steps[0]}
        made.append(_sign(f"bim-{words}", "BasicIterativeMethod", eps, tries, enough, chunk, **settings))
    for words, eps in bounds.items():
        settings = {"eps_step": 2.5 * eps / steps[1], "max_iter": steps[1], "num_random_init": 1}
        made.append(_sign(f"pgd-{words}", "ProjectedGradientDescent", eps, tries, enough, chunk, **settings))
    return made


def _minimal(name: str, norm: str, attack: str, settings: dict[str, Any], **counts: Any) -> AttackSpec:
    return AttackSpec(name, "minimal", norm, attack, settings, stretch=_STRETCH, **counts)


def _query(name: str, norm: str, attack: str, settings: dict[str, Any], **counts: Any) -> AttackSpec:
    return AttackSpec(name, "query", norm, attack, settings, **counts)


_SMALL = (
    *_bounded({"0.1": 0.1, "0.3": 0.3}, (20, 40), tries=1000, enough=250, chunk=50),
    _minimal("deepfool", "l2", "DeepFool", {"max_iter": 50, "epsilon": 0.02}, tries=300, enough=250, chunk=50),
    AttackSpec(
        "jsma", "sparse", "l0", "SaliencyMapMethod", {"theta": 1.0, "gamma": 0.15},
        tries=400, enough=250, chunk=50, aims=True,
    ),
    *[
        _query(f"square-{eps}", "linf", "SquareAttack", {"eps": eps, "max_iter": 2000, "nb_restarts": 1},
               tries=600, enough=220, chunk=50)
        for eps in (0.1, 0.3)
    ],
    *[
        _minimal(f"cw-l2-{confidence}", "l2", "CarliniL2", {"confidence": float(confidence)},
                 tries=240, enough=205, chunk=15)
        for confidence in (0, 5, 20)
    ],
    AttackSpec(
        "autoattack-0.1", "sign", "linf", "AutoAttackCapped", {"eps": 0.1, "steps": 50, "restarts": 1, "queries": 1000},
        tries=500, enough=205, chunk=50,
    ),
    AttackSpec(
        "spatial", "spatial", "none", "SpatialTransformation",
        {"max_translation": 10, "num_translations": 3, "max_rotation": 30, "num_rotations": 9},
        tries=400, enough=205, chunk=1, excluded=True,
    ),
    AttackSpec(
        "patch", "patch", "none", "AdversarialPatchLearnt",
        {"scale": 0.45, "rotation": 22.5, "rate": 0.05, "max_iter": 40, "batch": 50},
        tries=600, chunk=600, excluded=True,
    ),
    _minimal("elasticnet", "l1", "ElasticNet",
             {"binary_search_steps": 3, "max_iter": 40, "initial_const": 10.0, "beta": 0.01, "learning_rate": 0.05},
             tries=240, enough=205, chunk=50),
    _minimal("cw-linf", "linf", "CarliniLInf", {"rounds": 24, "max_iter": 20, "rate": 0.1, "shrink": 0.8},
             tries=240, enough=205, chunk=15),
    _query("hopskipjump", "l2", "HopSkipJump", {"norm": 2, "max_iter": 10, "max_eval": 1000, "init_eval": 100},
           tries=220, enough=205, chunk=1, stretch=_STRETCH),
    AttackSpec("pixel-20", "sparse", "l0", "PixelAttack", {"th": 20, "es": 1, "max_iter": 20},
               tries=500, enough=205, chunk=1),
)  # fmt: skip
_PHOTOGRAPHS = {"tries": 80, "enough": 56, "chunk": 16}
_IMAGENET = (
    *_bounded({"2": 2 / 255, "4": 4 / 255, "8": 8 / 255}, (10, 20), **_PHOTOGRAPHS),
    _minimal("deepfool", "l2", "DeepFool", {"max_iter": 20, "epsilon": 0.02, "nb_grads": 5},
             tries=64, enough=56, chunk=1),
    _sign("autoattack-4", "AutoAttackCapped", 4 / 255, steps=20, restarts=1, queries=200, **_PHOTOGRAPHS),
    *[
        _minimal(f"cw-l2-{confidence}", "l2", "CarliniL2",
                 {"confidence": float(confidence), "steps": 4, "max_iter": 40, "rate": 0.02, "initial": 4.0},
                 tries=64, enough=56, chunk=8)
        for confidence in (0, 5, 20)
    ],
    AttackSpec(
        "patch", "patch", "none", "AdversarialPatchLearnt",
        {"scale": 0.3, "rotation": 22.5, "rate": 0.05, "max_iter": 12, "batch": 16}, tries=64, chunk=64, excluded=True,
    ),
    _query("square-8", "linf", "SquareAttack", {"eps": 8 / 255, "max_iter": 500, "nb_restarts": 1}, **_PHOTOGRAPHS),
    AttackSpec(
        "spatial", "spatial", "none", "SpatialTransformation",
        {"max_translation": 10, "num_translations": 3, "max_rotation": 30, "num_rotations": 9},
        tries=80, enough=56, chunk=1, excluded=True,
    ),
    AttackSpec("jsma", "sparse", "l0", "SaliencyMapMethod", {"theta": 1.0, "gamma": 0.002},
               tries=64, enough=56, chunk=16, aims=True),
    _minimal("cw-linf", "linf", "CarliniLInf", {"rounds": 10, "max_iter": 8, "rate": 0.03, "shrink": 0.8},
             tries=64, enough=56, chunk=8),
    _minimal("elasticnet", "l1", "ElasticNet",
             {"binary_search_steps": 2, "max_iter": 20, "initial_const": 10.0, "beta": 0.01, "learning_rate": 0.02},
             tries=64, enough=56, chunk=4),
    _query("hopskipjump", "l2", "HopSkipJump", {"norm": 2, "max_iter": 5, "max_eval": 300, "init_eval": 100},
           tries=64, enough=56, chunk=1, stretch=_STRETCH),
    AttackSpec("pixel-100", "sparse", "l0", "PixelAttack", {"th": 100, "es": 1, "max_iter": 5},
               tries=64, enough=56, chunk=1),
)  # fmt: skip
_SUITES = {"small": _SMALL, "imagenet": _IMAGENET}
