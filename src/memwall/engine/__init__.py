"""The step loop: a loaded model, its cache and the tokens that come out.

One conversation: `load(model, Settings(...), budget=...)` gives a `Session`; `Session.generate` streams text.
Many requests: base is the scheduler seam, core the step loop over it, kv_pages the pages with shared beginnings, batch
the executor with a model, simulated the one with a virtual clock, serving loads a model for many inside one budget.
Swaps: swap is the file, stream runs copies beside the steps, switching decides what is copied and kept, fastswitch who
runs and what is waited for, priorities who goes first, chats holds conversations with an engine.
Phases apart: phased is the loop over two workers with one memory, apart the one over two; distserve decides, hand_over
copies, ranked cuts keys and values over ranks, saturation finds the batch that fills a worker.
Offline batches: prefix_tree finds what prompts share, batchllm plans and schedules, shared holds prefixes, offline
runs a plan.
"""

from memwall.engine.loading import Settings as Settings
from memwall.engine.quality import Evaluator as Evaluator
from memwall.engine.quality import Figures as Figures
from memwall.engine.quality import evaluate as evaluate
from memwall.engine.sampling import Sampler as Sampler
from memwall.engine.sampling import Sampling as Sampling
from memwall.engine.session import Generation as Generation
from memwall.engine.session import Session as Session
from memwall.engine.session import load as load
