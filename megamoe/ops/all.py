"""Every op with more than one implementation, in one list, in the order in which a layer comes to them."""

from __future__ import annotations

from typing import Any

from megamoe.ops.affinity import GRAP_AFFINITY
from megamoe.ops.expert_ffn import EXPERT_FFN
from megamoe.ops.glu import GLU
from megamoe.ops.movement import PERMUTE_ROWS, UNPERMUTE_ROWS
from megamoe.ops.plan import PLAN
from megamoe.ops.registry import Op
from megamoe.ops.scores import ROUTER_SCORES

OPS: tuple[Op[Any], ...] = (ROUTER_SCORES, GRAP_AFFINITY, PLAN, PERMUTE_ROWS, EXPERT_FFN, GLU, UNPERMUTE_ROWS)
