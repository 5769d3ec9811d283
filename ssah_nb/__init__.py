"""Superficial safety alignment, runnable: find, prune, freeze and train the safety units."""

__version__ = "0.1.0"

from .anchoring import Anchor
from .attribution import Importance, importance
from .budget import redundant_units, train_only
from .classes import classify, load_pruned, prune, pruned, search_scu
from .engine.agreement import judge_table
from .engine.alignment import STOCK_REFUSALS, alignment_pairs
from .engine.contrast import contrast_prompts, contrast_report
from .engine.data import embedded_splits, load_pairs
from .engine.evaluation import (
    attack_success,
    coherence,
    over_refusal,
    perplexity,
    safety_report,
    text_perplexity,
)
from .engine.generation import generate
from .engine.guards import guard_judge
from .engine.intervals import Estimate
from .engine.judges import JUDGES, is_refusal
from .engine.margin import (
    COMPLIANCE_OPENINGS,
    REFUSAL_OPENINGS,
    refusal_margin,
    refusal_margins,
)
from .engine.models import CHATML, load_model, save_model
from .engine.preferences import finetune_dpo, preferences, reference_margins
from .engine.run import SsahError, pick_mixed, set_seed, show_progress
from .engine.splits import Splits, make_splits
from .engine.scores import METHODS
from .engine.sources import SOURCES
from .engine.tasks import zero_shot
from .engine.template import chat_options
from .engine.training import finetune
from .freezing import WAYS, finetune_protected, freeze, merge
from .probe import probe
from .transfer import transfer
from .units import UnitMap, UnitMask
