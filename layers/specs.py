"""Per-layer specifications, derived once from the settings, without torch.

No other module reads settings that list layers.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from settings import Settings
from settings.model import query_dim, rotary_dim, value_dim


class RotarySpec(NamedTuple):
    """One set of rotary tables. Layers with equal ones share them."""
    width: int  # channels of a head's query and key
    turning: int | None = None  # channel pairs that rotate; None: all, with the frequencies of the paper
    short: bool = False  # YaRN follows the short window in place of the long one


@dataclass(frozen=True)
class AttnSpec:
    """Attention of one layer."""
    heads: int
    qk: int  # width of a head's query and key
    v: int  # width of a head's value
    rotary: RotarySpec | None  # tables of the rotary positions; None: no rotary embedding
    window: Literal["long", "short"] | None  # the window of this layer; None: no window
    gate: int | None  # input channels of the gate on each head's output
    value_table: int | None  # number of the value embedding table; None: none
    value_gate: int | None = None  # input channels of the gate on each head's row of this table
    key_offset: int = 0  # channel pairs of a key that are those of the previous token
    value_gate_own: bool = False  # whether half of these channels are the value embedding's own
    paired: bool = False  # heads h and h + heads/2 share one sequence
    saved_input: int | None = None  # layer after which the stream is attention's input; None: as it arrives
    xsa: bool = False  # exclusive self-attention
    compose: int | None = None  # window of composed heads; None: heads are not composed
    scale: float | None = None  # softmax scale before YaRN; None: 1 / sqrt(qk)
    # width of a head's query and key in the matrices, of which it reads the first qk
    qk_stored: int | None = None
    v_stored: int | None = None  # likewise of a value


@dataclass(frozen=True)
class LayerSpec:
    """One block. A part that is None (False) is dropped."""
    attn: AttnSpec | None
    mlp: int | None  # hidden width of the dense MLP
    moe: bool  # mixture of experts instead of the dense MLP
    parallel_mlp: bool = False  # a second dense MLP of the same input
    c_fc_factor: float = 1.0  # of the initial values of the dense MLP's first matrix

    @property
    def empty(self) -> bool:
        """Whether the layer has neither attention nor MLP, so that the stream passes unchanged."""
        return self.attn is None and self.mlp is None and not self.moe


def layer_specs(s: Settings) -> tuple[LayerSpec, ...]:
    """The specification of every layer."""
    return tuple(
        LayerSpec(
            attn_spec(s, layer), *mlp_spec(s, layer), parallel_mlp=layer in s.model.mlp.parallel_layers,
            c_fc_factor=1 - s.model.init.c_fc_fall * layer / max(1, s.model.num_layers - 1)
        )
        for layer in range(s.model.num_layers)
    )


def attn_spec(s: Settings, layer: int) -> AttnSpec | None:
    """The attention of a layer, None where it is dropped."""
    a = s.model.attn
    if layer in a.drop_layers:
        return None
    window = None
    if a.window is not None:
        window = "long" if a.window.long_layers is None or layer in a.window.long_layers else "short"
    table = a.value_embed.tables[layer] if a.value_embed else -1
    value_gate = a.value_embed.gate if table >= 0 else None
    paired = layer in a.paired_layers
    offset = a.key_offset and window != "short" and not paired
    own = value_gate is not None and (
        value_gate.own_channels == "all" or (value_gate.own_channels == "unpaired" and not paired)
    )
    narrow_qk = a.narrow is not None and layer in a.narrow.qk_layers
    narrow_v = a.narrow is not None and layer in a.narrow.v_layers
    saved = a.saved_input is not None and layer > a.saved_input
    return AttnSpec(
        heads=a.num_heads, qk=a.narrow.qk_dim if narrow_qk else query_dim(s),
        v=a.narrow.v_dim if narrow_v else value_dim(s), rotary=rotary_spec(s, narrow_qk) if a.rope else None,
        window=window, gate=head_gate(s, layer), value_table=table if table >= 0 else None,
        value_gate=value_gate.channels if value_gate else None, value_gate_own=own,
        key_offset=static_pairs(s) if offset else 0, paired=paired,
        saved_input=a.saved_input if saved else None, xsa=a.xsa is not None and layer in a.xsa.layers,
        compose=a.compose.window if a.compose and layer in a.compose.layers else None,
        scale=a.narrow.scale if narrow_qk else a.scale,
        qk_stored=query_dim(s) if narrow_qk else None, v_stored=value_dim(s) if narrow_v else None
    )


def rotary_spec(s: Settings, narrow: bool) -> RotarySpec:
    """The rotary tables of a layer. Narrow queries and keys rotate all their channels."""
    if narrow:
        return RotarySpec(s.model.attn.narrow.qk_dim, s.model.attn.narrow.qk_dim // 2, short=True)
    return RotarySpec(rotary_dim(s), turning_pairs(s))


def turning_pairs(s: Settings) -> int | None:
    """Channel pairs that rotate with the half-truncated frequencies, None with those of the paper.

    Half of the pairs, or with narrow heads as many as those have.
    """
    if not s.model.attn.rope.half_truncated:
        return None
    return s.model.attn.narrow.qk_dim // 2 if s.model.attn.narrow else rotary_dim(s) // 4


def static_pairs(s: Settings) -> int:
    """Channel pairs that do not rotate, whose keys the key offset moves."""
    return rotary_dim(s) // 2 - turning_pairs(s)


def head_gate(s: Settings, layer: int) -> int | None:
    """Input channels of the gate on a layer's heads.

    None without a gate, and with token gates, whose networks give the gate instead (gated_layers).
    """
    gate = s.model.attn.gate
    own = gate is not None and s.model.token_gates is None
    return gate.channels if own and layer in gated_layers(s) else None


def gated_layers(s: Settings) -> tuple[int, ...]:
    """The layers whose heads have a gate of either kind."""
    a = s.model.attn
    if a.gate is None:
        return ()
    named = range(s.model.num_layers) if a.gate.layers is None else a.gate.layers
    return tuple(i for i in named if i not in a.drop_layers)


def mlp_spec(s: Settings, layer: int) -> tuple[int | None, bool]:
    """(hidden width of the dense MLP or None, whether the layer has experts)."""
    mlp = s.model.mlp
    if layer in mlp.drop_layers:
        return None, False
    if mlp.moe is not None and layer not in mlp.moe.dense_layers:
        return None, True
    hidden = mlp.hidden or mlp.expansion * s.model.model_dim
    return (2 * hidden // 3 if mlp.activation == "swiglu" else hidden), False


def has_short_window(s: Settings) -> bool:
    """Whether some layers have the short window."""
    return any(spec.attn is not None and spec.attn.window == "short" for spec in layer_specs(s))


def num_value_tables(s: Settings) -> int:
    """How many token tables model.attn.value_embed has; a dropped layer's table is among them."""
    return max(s.model.attn.value_embed.tables) + 1
