"""Speculative decoding with token trees for Hugging Face models.

model = specdec.wrap(hf_model, drafter="ngram")
model.generate(**inputs, max_new_tokens=200)
"""

from specdec import models
from specdec.batch import TreeBatch
from specdec.branching import Branch, logprobs, score
from specdec.custom_generate import generate
from specdec.drafting import DraftContext, Drafter, NoDraft, Observation, SequenceDrafter
from specdec.pages import OutOfPages
from specdec.request import RequestError, Verified
from specdec.serving import Handle, ServingEngine
from specdec.stats import GenerationStats
from specdec.support import UnsupportedModel
from specdec.topology import Topology
from specdec.tree import ProposalLaw, TokenTree
from specdec.wrap import SpeculativeModel, wrap

__version__ = "0.1.0"

__all__ = [
    "Branch",
    "DraftContext",
    "Drafter",
    "GenerationStats",
    "Handle",
    "NoDraft",
    "Observation",
    "OutOfPages",
    "ProposalLaw",
    "RequestError",
    "SequenceDrafter",
    "ServingEngine",
    "SpeculativeModel",
    "TokenTree",
    "Topology",
    "TreeBatch",
    "UnsupportedModel",
    "Verified",
    "generate",
    "logprobs",
    "models",
    "score",
    "wrap",
]
