"""The script NVFlare runs at every site, as in its PyTorch examples."""

from __future__ import annotations

import sys

import nvflare.client as flare
import torch

from benchmarks import workload


def main(name: str) -> None:
    torch.set_num_threads(1)
    flare.init()
    site = int(flare.get_site_name().removeprefix("site-")) - 1
    model = workload.build_model(name)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        model.load_state_dict(received.params)
        loss, _ = workload.train(name, model, site, int(received.current_round))
        params = {k: v.cpu() for k, v in model.state_dict().items()}
        flare.send(
            flare.FLModel(
                params=params,
                metrics={"loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": 1},
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
