"""A program: readers that call torch on borrowed tensors, and on DLPack views of them."""

import torch
from stress import ELEMENTS, run
from torch.utils.dlpack import from_dlpack
from torch_subject import live_bytes

State = dict[str, torch.Tensor]


def make(value: float) -> State:
    return {name: torch.full((ELEMENTS,), float(value)) for name in "kv"}


def with_torch(state: State) -> tuple[float, float]:
    return float(state["k"].min()), float(state["v"].max())


def with_views(state: State) -> tuple[float, float]:
    views = {name: from_dlpack(tensor) for name, tensor in state.items()}
    state.clear()  # the views are what is read
    return with_torch(views)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ways = {"torch": with_torch, "DLPack": with_views, "torch too": with_torch, "DLPack too": with_views}
    run(make, ways, live_bytes)
