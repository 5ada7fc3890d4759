"""An epoch before it is over: enough of it to go on in its midst as if nothing had happened."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor


class EpochSoFar:
    """What the steps of an epoch have added up to in this process, and what random numbers the next one draws.

    Order and augmentation of its images follow from the number of steps, see `EpochSampler`.
    """

    def __init__(self, number: int, seed: int, accelerator: Accelerator):
        self.number, self.accelerator = number, accelerator  # epochs before it
        self.seed = seed + 1000 * (number + 1) + accelerator.process_index
        self.steps, self.names, self.sums, self.padding = 0, [], 0.0, 0.0
        self._random: list[Tensor] | None = None  # states of the generators where it goes on

    def begin(self) -> None:
        """Before its first step here: dropout too depends on seed and epoch alone, so that runs can be repeated."""
        set_seed(self.seed)
        if self._random is not None:
            torch.set_rng_state(self._random[0])
            for state in self._random[1:] if self._on_gpu else ():
                torch.cuda.set_rng_state(state, self.accelerator.device)

    def add(self, terms: dict[str, Tensor], padding: float) -> None:
        """What a step has logged, and the padding of its batch."""
        self.names, self.sums = list(terms), self.sums + torch.stack(list(terms.values()))
        self.padding += padding
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Of everything logged in its steps, over all processes."""
        totals = self.accelerator.reduce(self.sums, "mean") / self.steps
        means = {f"epoch/{name}": value for name, value in zip(self.names, totals.tolist(), strict=True)}
        return means | {"extra/padding": self.padding / self.steps}

    def state_dict(self) -> dict:
        """All of it, of every process; each has to ask."""
        random = [torch.get_rng_state()]
        if self._on_gpu:
            random.append(torch.cuda.get_rng_state(self.accelerator.device))
        processes = gather_object([{"sums": self.sums.cpu(), "random": random}])
        return {"steps": self.steps, "names": self.names, "padding": self.padding, "processes": processes}

    def load_state_dict(self, saved: dict) -> None:
        """Go on from there; in another number of processes with the same means, but other random numbers."""
        self.steps, self.names, self.padding = (saved[name] for name in ("steps", "names", "padding"))
        processes, device = saved["processes"], self.accelerator.device
        if len(processes) == self.accelerator.num_processes:
            own = processes[self.accelerator.process_index]
            self.sums, self._random = own["sums"].to(device), own["random"]
        else:
            self.sums = torch.stack([each["sums"] for each in processes]).mean(0).to(device)

    @property
    def _on_gpu(self) -> bool:
        return self.accelerator.device.type == "cuda"
