"""Where candidate trees come from. Names in `DRAFTERS` can be given to `specdec.wrap`."""

from collections.abc import Callable

from specdec.drafters.chains import Chains
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.growth import Beam
from specdec.drafters.ngram import NGram
from specdec.drafting import Drafter, NoDraft

DRAFTERS: dict[str, Callable[[], Drafter]] = {"none": NoDraft, "ngram": NGram}

__all__ = ["DRAFTERS", "Beam", "Chains", "DraftModel", "NGram", "NoDraft"]
