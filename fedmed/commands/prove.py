"""`fedmed prove`: the guarantee as a command."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import typer

from fedmed.prove import prove

LIMIT = 1e-12
"""Largest accepted difference in float64."""


def prove_command(
    strategy: str, overrides: tuple[str, ...], *, steps: int, as_json: bool
) -> None:
    """Prove and print; exit code 1 if the difference exceeds `LIMIT`."""
    proof = prove(strategy, steps=steps, overrides=overrides)
    holds = proof.max_abs_diff <= LIMIT
    if as_json:
        typer.echo(json.dumps({**asdict(proof), "limit": LIMIT, "holds": holds}))
    else:
        place = f" (in {proof.where})" if proof.where else ""
        typer.echo(
            f"{strategy}: after {steps} steps on three phantom hospitals in float64, "
            f"federated and pooled training differ by at most {proof.max_abs_diff:.1e}"
            f"{place};\n{proof.num_compared} numbers compared, the weights moved by up "
            f"to {proof.moved:.1e}. {'Equal to rounding.' if holds else 'NOT EQUAL.'}"
        )
    if not holds:
        sys.exit(1)
