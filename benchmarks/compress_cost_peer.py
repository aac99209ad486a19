"""GPTQ by gptqmodel on the processor, for compress_cost.py: SOURCE OUT TOKENS; prints what `quantize` took.

Random token ids stand for the text: what is multiplied is as much.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main(source: str, out: str, num_tokens: int) -> None:
    import gptqmodel
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = QuantizeConfig(bits=4, group_size=64, desc_act=True, sym=True)
    model = GPTQModel.load(source, config, device="cpu")
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 256, (1, 512), generator=random) for _ in range(num_tokens // 512)]
    began, busy = time.perf_counter(), time.process_time()
    model.quantize([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows], batch_size=1)
    marks = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - busy}
    model.save(out)
    print("\nMEASURED", json.dumps(marks | {"version": gptqmodel.__version__}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
