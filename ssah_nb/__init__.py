"""The Superficial Safety Alignment Hypothesis, runnable: find, prune, freeze and train the safety units of a chat model."""

__version__ = "0.1.0"

from .alignment_probe import STOCK_REFUSALS, alignment_pairs, finetune, probe
from .attribution import METHODS, Importance, importance
from .budget import finetune_dpo, preferences, redundant_units, reference_margins, train_only
from .classes import UnitMap, UnitMask, classify, load_pruned, prune, pruned, search_scu
from .data import SOURCES, Splits, load_pairs, make_splits
from .evaluation import Estimate, attack_success, coherence, generate, is_refusal, over_refusal, perplexity, safety_report, text_perplexity, zero_shot
from .freezing import WAYS, finetune_protected, freeze, merge
from .models import load_model, save_model
from .setup import SsahError, pick_mixed, set_seed, show_progress
from .transfer import transfer
