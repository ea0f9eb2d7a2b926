"""Which combinations of design, basis, method and strength can be asked for, and what is said of the others."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from tl_circuitlasso._checks import shortened
from tl_circuitlasso.discover.designs import DESIGNS, way_of
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.bases import Basis, Neuron, as_basis
from tl_circuitlasso.models.designs import Design
from tl_circuitlasso.models.sae import SAEFeatures


def as_design(design: str, basis: str | Basis, *, nonlinear: bool = False) -> Design:
    """The design that a user named, for the basis.

    >>> as_design("paper", "component").basis
    Component(directions=None, name='component')

    Raises
    ------
    InputError: no design of that name, or one that needs another basis, or that has no nonlinear variant.
    """
    way = way_of(design)
    if not isinstance(nonlinear, bool):
        raise InputError(f"`nonlinear` is {shortened(nonlinear)}: write True or False")
    chosen = way.component() if isinstance(basis, str) and basis == "component" else as_basis(basis)
    if nonlinear and not way.bends:
        bending = " and ".join(repr(name) for name, one in DESIGNS.items() if one.bends)
        raise InputError(f"`nonlinear` is for the designs {bending}: leave it out")
    if chosen.name != "component" and not way.others:
        known = "design='read' or 'activation'" if isinstance(chosen, Neuron) else "design='activation'"
        raise InputError(f"`design` {design!r} reads whole components: with basis={chosen.name!r} use {known}")
    if isinstance(chosen, Neuron) and (chosen.linked or chosen.reference != "mean"):
        name = "linked" if chosen.linked else "reference"
        raise InputError(
            f"`{name}` of Neuron is for design 'read': design {design!r} regresses neurons at one position, without "
            "seeing attention; use design='read', or leave it out"
        )
    return way.collects(chosen, nonlinear=nonlinear) if way.bends else way.collects(chosen)


def as_strength(strength: str | int | float) -> str | float:
    """A strength that can be used: a named rule, or a fraction of lambda_max.

    Raises
    ------
    InputError: unknown name, negative, above 1 or not finite.
    """
    names = ("auto", "cv", "ebic", "mcp", "stability")
    if isinstance(strength, str):
        if strength not in names:
            raise InputError(f"`strength` {strength!r} is unknown: use one of {names}, or a number from 0 to 1")
        return strength
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 <= strength <= 1:
        raise InputError(
            f"`strength` is {shortened(strength)}: give one of {names}, or a fraction of lambda_max from 0 "
            "(dense) to 1 (empty)"
        )
    return float(strength)


def check_neurons(basis: Neuron, method: str, strength: str | int | float, refused: Mapping[str, Any]) -> None:
    """Refuse what circuits of neurons under design "read" don't use."""
    if method != "lasso":
        raise InputError(
            f"`method` {method!r} cuts edges between components; test neurons with `evaluate.faithfulness`"
        )
    if strength != "auto" and (isinstance(strength, str) or not basis.linked):
        raise InputError(
            f"`strength` {strength!r} is for regressions: neurons of design 'read' have them only between linked ones, "
            "as a fraction of lambda_max: use basis=Neuron(linked=...), or leave it at 'auto'"
        )
    for name, given in refused.items():
        if given is not None:
            raise InputError(f"`{name}` isn't used by basis 'neuron' with design 'read': leave it out")


def check_features(
    basis: SAEFeatures, design: str, method: str, strength: str | int | float, *, nonlinear: bool
) -> None:
    """Refuse what circuits of SAE features don't use."""
    if nonlinear:
        raise InputError(
            "`nonlinear` is for components, neurons and residual dimensions: leave it out with SAEFeatures"
        )
    if not way_of(design).features:
        raise InputError(f"`design` {design!r} is for components: SAEFeatures(mixing=...) says where parents are seen")
    if method != "lasso":
        raise InputError(f"`method` {method!r} cuts edges between components; check features with `evaluate.edges`")
    if strength == "mcp" and basis.penalty != "l1":
        raise InputError(
            f"`strength` 'mcp' is a penalty of its own and doesn't go with {basis.penalty!r}: use "
            "SAEFeatures(..., penalty='l1')"
        )
