"""Checks for the exercises of the notebooks: a reader's function against a reference."""

from collections.abc import Callable, Iterable

import torch


def check(attempt: Callable, reference: Callable, cases: Iterable[tuple]) -> str:
    """Call both functions with the arguments of every case and say whether results agree, or where they first differ.

    An attempt that returns None counts as not begun. Errors of the attempt are reported, never raised, so that an
    unsolved exercise does not stop a notebook that runs headless.
    """
    cases = list(cases)
    for case in cases:
        wanted = torch.as_tensor(reference(*case))
        arguments = ", ".join(str(argument) for argument in case)
        try:
            result = attempt(
                *(argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in case)
            )
            if result is None:
                return "Not solved yet: the function returns None."
            result = torch.as_tensor(result)
        except Exception as error:
            return f"Not yet: {type(error).__name__}: {error}\nfor {arguments}"
        if result.shape != wanted.shape:
            return f"Not yet: the shape is {list(result.shape)}, wanted {list(wanted.shape)}\nfor {arguments}"
        if not torch.allclose(result.double(), wanted.double(), rtol=1e-4, atol=1e-5):
            return f"Not yet: {result}\nwanted {wanted}\nfor {arguments}"
    return f"Correct, in all {len(cases)} cases."
