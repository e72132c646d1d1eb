"""Laws of the model of records 34 to 57: each feature is neutral when its numbers say so and does what its
equation says; the traps of these records.

The numbers of the original code are in test_golden.py. Float64, every parameter random, so that no term hides
behind a zero.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import sample
import schedule
from common.errors import UserError
from golden_records import RECORD_53
from kernels.qk_rotary import qk_rotary_reference
from layers.specs import layer_specs
from layers.head import Head, bounded
from model import GPT, without_values
from settings import deltas, schema
from settings.model import Softcap

BOS = 1256
LATE = [f"{path}={value}" for path, value in RECORD_53.items()]
GATED = ["model.attn.value_embed.gate=true", "model.residual.unet_skips.gate=true"]  # record 55


def settings(*sets, ref="short/33", precision="float64"):
    """Of `path=value` on a record at micro; of several values for a path the last one counts."""
    values = dict(text.split("=", 1) for text in [f"system.precision={precision}", *sets])
    return deltas.resolve(ref, scale="micro", sets=[f"{k}={v}" for k, v in values.items()]).settings


def built(*sets, scramble=True, **options):
    """A small model; scramble: every parameter random and non-zero."""
    model = GPT(settings(*sets, **options))
    model.initialise(0)
    for name, p in sorted(model.named_parameters()) if scramble else ():
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype)
        p.data += 0.3 * noise
    return model


def text(rows=2, length=96):
    """Ids (R, T) in documents of 20 tokens."""
    ids = torch.randint(BOS, (rows, length), generator=torch.Generator().manual_seed(2))
    ids[:, ::20] = BOS
    return ids


def logits(model, x):
    return model(x, context=model.context(x, BOS, schedule.windows(model.settings, 0)))


def same(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-11)


def shared_state(model, other):
    """Give `model` the parameters of `other` that have its names and shapes; the others stay."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in theirs and theirs[name].shape == p.shape:
                p.copy_(theirs[name])
    return model


def without(feature, *sets):
    """(model with, model without a feature, with equal parameters as far as both have them)."""
    on = built(*sets)
    return on, shared_state(built(*sets, f"{feature}=false"), on)


# ----- smear

@pytest.mark.feature("model.embed.smear")
def test_smear_with_a_lambda_of_zero_is_off():
    (on, off), x = without("model.embed.smear", *LATE), text()
    assert not same(logits(on, x), logits(off, x))
    on.embed.smear.lam.value.data.zero_()
    assert same(logits(on, x), logits(off, x))


@pytest.mark.feature("model.embed.smear")
def test_smear_adds_a_gated_part_of_the_row_before_and_crosses_documents():
    """Trap: the mask of documents does not hold for it, and it comes before the norm."""
    model, x = built("model.embed.smear=true"), text()
    e, smear, rows = F.embedding(x, model.embed.weight), model.embed.smear, []
    for t in range(x.size(1)):
        share = smear.lam.value * torch.sigmoid(e[:, t, :12] @ smear.gate.T)
        rows.append(e[:, t] + share * e[:, t - 1] if t else e[:, 0])
    expected = torch.stack(rows, 1)
    eps = model.settings.numerics.norm_eps
    expected = expected / (expected.square().mean(-1, keepdim=True) + eps).sqrt()
    found = model.embed(x)
    assert same(found, expected)
    other = x.clone()
    other[:, 19] = (other[:, 19] + 1) % BOS  # the last token of the first document
    assert x[0, 20] == BOS and not same(found[:, 20], model.embed(other)[:, 20])


@pytest.mark.feature("model.embed.smear.learned", "model.residual.backout.learned",
                     "model.attn.sa_lambdas.learned")
@pytest.mark.parametrize("feature", ["model.embed.smear", "model.residual.backout", "model.attn.sa_lambdas"])
def test_a_coefficient_that_is_not_learned_is_its_initial_value(feature):
    learned = built(*LATE, "model.embed.smear.init=0.25", scramble=False)
    fixed = built(*LATE, "model.embed.smear.init=0.25", f"{feature}.learned=false", scramble=False)
    names = [set(dict(m.named_parameters())) for m in (learned, fixed)]
    assert names[1] < names[0]
    for model in (learned, fixed):  # projections, tables and gates start at zero, which would hide them
        for name, p in model.named_parameters():
            if p.dim() > 1:
                generator = torch.Generator().manual_seed(len(name))
                p.data += torch.randn(p.shape, generator=generator, dtype=p.dtype)
    assert same(logits(learned, text()), logits(fixed, text()))


# ----- skips, backout, empty layers

@pytest.mark.feature("model.residual.backout")
def test_backout_of_zero_is_off_and_otherwise_subtracts_the_stream():
    (on, off), x = without("model.residual.backout", *LATE), text()
    seen, b = {}, on.residual.backout.value

    def save(stream, name, x):
        if name.startswith("saved."):
            seen[int(name.partition(".")[2])] = x

    mine = off.residual.start
    off.residual.sources |= {"saved.7", "saved.10"}

    def start(*given):
        stream = mine(*given)
        keep = stream.keep
        stream.keep = lambda name, x: (keep(name, x), save(stream, name, x))
        return stream

    off.residual.start = start
    logits(off, x)
    expected = on.lm_head(on.norm(seen[10] - b * seen[7]), on.embed.weight)
    assert same(logits(on, x), expected) and not same(logits(on, x), logits(off, x))
    b.data.zero_()
    assert same(logits(on, x), logits(off, x))


@pytest.mark.feature("model.residual.unet_skips.pairs")
def test_the_pairs_of_the_whole_u_net_are_the_u_net():
    pairs = [[5 - k, 6 + k] for k in range(6)]
    on, off = built(f"model.residual.unet_skips.pairs={pairs}"), built()
    assert same(logits(on, text()), logits(shared_state(off, on), text()))
    one = shared_state(built("model.residual.unet_skips.pairs=[[4, 7]]"), on)
    assert len(one.residual.skip_weights.value) == 1
    with torch.no_grad():
        one.residual.skip_weights.value.copy_(on.residual.skip_weights.value[1])
        on.residual.skip_weights.value[[0, 2, 3, 4, 5]] = -1e9  # under the sigmoid: zero
    assert same(logits(on, text()), logits(one, text()))


@pytest.mark.feature("model.residual.unet_skips.gate")
def test_a_skip_gate_of_zero_is_off_and_otherwise_reads_the_embedding():
    (on, off), x = without("model.residual.unet_skips.gate", *LATE, *GATED), text()
    assert on.residual.skip_gate.shape == (1, 12) and not same(logits(on, x), logits(off, x))
    x0 = on.embed(x, table=on.lm_head.weight)
    stream = on.residual.start(x0)
    stream.begin()
    weight = stream.coefs["skip_weights"][0]
    gate = 2 * torch.sigmoid(x0[..., :12] @ on.residual.skip_gate.T)
    assert same(weight, torch.sigmoid(on.residual.skip_weights.value) * gate)
    on.residual.skip_gate.data.zero_()
    assert same(logits(on, x), logits(off, x))


@pytest.mark.feature("model.attn.drop_layers", "model.mlp.drop_layers")
def test_of_a_layer_without_both_parts_nothing_is_left():
    """Record 35: no mix with the embedding, no skip, no parameters, and the next layer begins with x0."""
    model = built("model.attn.drop_layers=[0, 7]", "model.mlp.drop_layers=[0]")
    assert not any(name.startswith("blocks.0.") for name, _ in model.named_parameters())
    assert len(model.residual.resid_lambdas.value) == len(model.residual.x0_lambdas.value) == 11
    assert len(model.residual.skip_weights.value) == 5 and ("skip", 11) not in model.residual.terms
    assert [terms[0].source for (site, layer), terms in model.residual.terms.items() if site == "skip"] == [
        f"saved.{i}" for i in (5, 4, 3, 2, 1)]
    seen = []
    model.blocks[1].attn_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = text()
    logits(model, x)
    a, b = model.residual.resid_lambdas.value[0], model.residual.x0_lambdas.value[0]
    assert same(seen[0], (a + b) * model.embed(x))


# ----- attention

@pytest.mark.feature("model.attn.sa_lambdas", "model.attn.sa_lambdas.o")
def test_sa_lambdas_are_factors_of_the_weights():
    (on, off), x = without("model.attn.sa_lambdas", *LATE), text()
    assert not same(logits(on, x), logits(off, x))
    a0, a1, k = on.sa_lambdas.qkv.value, on.sa_lambdas.o.value, 0
    for block in off.blocks:
        if block.attn is not None:
            block.attn.qkvo.data[:3] *= a0.data[k]
            block.attn.qkvo.data[3] *= a1.data[k]
            k += 1
    assert k == 10 and same(logits(on, x), logits(off, x))


@pytest.mark.feature("model.attn.sa_lambdas")
def test_record_47_is_the_function_of_record_46():
    """The factor of the values moves to the weights of q, k and v; QK norm takes it out of q and k."""
    eps = "numerics.qk_norm_eps=0.0"
    before, x = built(eps), text()
    after = built(eps, "model.attn.value_embed.mix=scaled", "model.attn.sa_lambdas={qkv=0.5}")
    shared_state(after, before)
    with torch.no_grad():
        before.values.v_lambdas.value.abs_()
        after.sa_lambdas.qkv.value.copy_(before.values.v_lambdas.value)
    assert same(logits(before, x), logits(after, x))


@pytest.mark.feature("model.attn.value_embed")
def test_value_embeddings_in_the_sum_have_the_weight_one():
    summed = built("model.attn.value_embed.mix=sum")
    scaled = shared_state(built("model.attn.value_embed.mix=scaled"), summed)
    assert not hasattr(summed.values.ve_lambdas, "value") and not same(
        logits(summed, text()), logits(scaled, text())
    )
    scaled.values.ve_lambdas.value.data.fill_(1.0)
    assert same(logits(summed, text()), logits(scaled, text()))


@pytest.mark.feature("model.attn.value_embed.gate")
def test_a_value_gate_of_zero_is_off_and_gates_each_head_by_the_block_s_input():
    (on, off), x = without("model.attn.value_embed.gate", *LATE, *GATED), text()
    assert sorted(map(int, on.values.gates)) == [0, 1, 8, 9, 10]
    assert not same(logits(on, x), logits(off, x))
    v, n = torch.randn(2, 96, 6, 8, dtype=torch.float64), torch.randn(2, 96, 48, dtype=torch.float64)
    gate = 2 * torch.sigmoid(n[..., :12] @ on.values.gates["8"].T)  # (R, T, H)
    ve = F.embedding(x, on.values.tables[0]).view(v.shape)
    assert same(on.values.begin(x)(8, v, n), v + gate[..., None] * ve)
    for gate in on.values.gates.values():
        gate.data.zero_()
    assert same(logits(on, x), logits(off, x))


@pytest.mark.feature("model.attn.key_offset")
def test_the_key_offset_moves_what_does_not_rotate_in_long_layers_only():
    """Trap: it crosses documents; the first token of a row keeps its own key."""
    (on, off), x = without("model.attn.key_offset", *LATE), text()
    specs = layer_specs(on.settings)
    assert [i for i, spec in enumerate(specs) if spec.attn and spec.attn.key_offset] == [3, 10]
    assert not same(logits(on, x), logits(off, x))
    keys = {}

    def spy(model, name):
        from layers import attention as module
        plain = module.attention.attend

        def attend(q, k, v, view, scale):
            keys.setdefault(name, []).append(k)
            return plain(q, k, v, view, scale)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.attention, "attend", attend)
            logits(model, x)

    spy(on, "on")
    spy(off, "off")
    moved = torch.tensor([False, False, True, True] * 2)  # a head has 8 channels: pairs (j, j + 4)
    for i in range(3):
        assert same(keys["on"][i], keys["off"][i])
    a, b = keys["on"][3], keys["off"][3]
    assert same(a[..., ~moved], b[..., ~moved]) and same(a[:, 0], b[:, 0])
    assert same(a[:, 1:][..., moved], b[:, :-1][..., moved])


@pytest.mark.feature("model.attn.key_offset", "numerics.qk_norm_eps")
def test_the_fused_kernel_is_given_the_offset_and_the_eps_of_each_layer(monkeypatch):
    """With the reference in place of the kernel the model is the same one, and no key is moved twice."""
    def reference(qkv, cos, sin, **options):
        q, k, v = qkv.unbind(2)
        wide = dict(norm_dtype=torch.float64, math_dtype=torch.float64)
        return *qk_rotary_reference(q, k, cos, sin, **wide, **options), v

    model, x = built(*LATE, "numerics.qk_norm_eps=0.5"), text()
    before = logits(model, x)
    monkeypatch.setattr("layers.attention.qkv_rotary", reference)
    for block in model.blocks:
        if block.attn is not None:
            block.attn.fused = True
    assert same(logits(model, x), before)


@pytest.mark.feature("numerics.qk_norm_eps")
def test_qk_norm_has_an_eps_of_its_own():
    sets = "numerics.norm_eps=1e-5"
    plain, equal, other = (built(sets, *more, ref="short/5") for more in (
        ["numerics.qk_norm_eps=false"], ["numerics.qk_norm_eps=1e-5"], ["numerics.qk_norm_eps=0.5"]))
    x = text(length=64)
    assert same(plain(x), equal(x)) and not same(plain(x), other(x))
    q = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    assert same(other.blocks[0].attn.norm(q), q / (q.square().mean(-1, keepdim=True) + 0.5).sqrt())
    assert [deltas.resolve(f"short/{i}").settings.numerics.qk_norm_eps for i in (4, 5, 9, 10, 33)] == [
        None, 2 ** -7, 2 ** -7, None, None]


# ----- parameters and initial values

@pytest.mark.parametrize("sets, original, padding", [
    # six skips, a pair of layer 7, zeros behind that of the smear; a pair of layer 6, zeros at the end
    (["model.embed.smear=true"], 271_025_004, 6 + 2 + 11),
    (LATE, 268_665_615, 2 + 4),
    ([*LATE, *GATED], 268_665_987, 2 + 4),
])
def test_parameter_counts_of_records_34_53_and_55_are_the_originals(sets, original, padding):
    """But for the entries of the original's packed vector of scalars that nothing reads."""
    assert without_values(deltas.resolve("short/33", sets=sets).settings).num_parameters() == original - padding


def test_coefficients_and_gates_of_record_55_begin_with_the_values_of_the_original():
    model = built(*LATE, *GATED, scramble=False)
    found = {
        name: {round(x, 6) for x in p.flatten().tolist()} for name, p in model.named_parameters()
        if p.role == "scalar" or "gate" in p.label}
    gates = {name for name in found if "gate" in name}
    assert len(gates) == 2 + 10 + 5 and all(found.pop(name) == {0.0} for name in gates)
    assert found == {
        "embed.smear.lam.value": {0.0}, "residual.resid_lambdas.value": {1.1},
        "residual.x0_lambdas.value": {0.0}, "residual.backout.value": {0.5},
        "residual.skip_weights.value": {-1.5}, "sa_lambdas.qkv.value": {0.5}, "sa_lambdas.o.value": {1.0}
    }


@pytest.mark.feature("model.init.qkv_bound")
def test_record_53_doubles_the_initial_spread_of_q_k_and_v():
    """Trap: its text says halved. 0.5 / sqrt(D) becomes 1 / sqrt(D); the MLP keeps its spread."""
    before, after = built("model.embed.smear=true", scramble=False), built(*LATE, scramble=False)
    for model, std in ((before, 0.5), (after, 1.0)):
        qkv = torch.stack([block.attn.qkvo[:3] for block in model.blocks if block.attn is not None])
        assert abs(qkv.std().item() * math.sqrt(48) - std) < 0.01 * std
        up = torch.stack([block.mlp.c_fc for block in model.blocks if block.mlp is not None])
        assert abs(up.std().item() * math.sqrt(48) - 0.5) < 0.005


@pytest.mark.feature("model.init.head_std")
@pytest.mark.parametrize("head", ["false", "{tied_until = 0.5}", "true"])
def test_the_head_s_weight_begins_with_the_spread_that_is_given(head):
    """Tied for good (record 51), tied at first (record 53) and untied; embeddings are normed with an eps that
    does not crush rows of this size (trap: 2^-7 would)."""
    model = built("model.init.head_std=0.005", f"model.head.untied={head}", scramble=False)
    weight = model.embed.weight if model.lm_head.weight is None else model.lm_head.weight
    assert abs(weight.std().item() - 0.005) < 1e-4 and abs(weight.mean().item()) < 1e-4
    if head != "true":
        rows = model.embed(text(), table=weight)
        assert 0.98 < rows.square().mean().sqrt() < 1
        model.embed.norm.eps = 2 ** -7
        assert model.embed(text(), table=weight).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("cap, shift, logged", [
    (30.0, 0.0, [10.8369, 10.8322, 10.8367]), (23.0, 5.0, [10.8283, 10.8300, 10.8299, 10.8289])])
def test_step_0_losses_of_a_random_tied_head_are_near_the_logged_ones(cap, shift, logged):
    """Trap: ln V until record 50, and then ln V + slope^2 D std^2 / 2 to second order, slope that of the cap
    at 0. Logged: records 51 to 53 and 54 to 57."""
    model = built(
        *LATE, "model.init.head_std=0.005", f"model.head.softcap.cap={cap}",
        f"model.head.softcap.shift={shift}", scramble=False)
    z = torch.linspace(-1e-4, 1e-4, 3, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(bounded(z, model.lm_head.softcap)[1], z)
    expected = math.log(50304) + slope[1].item() ** 2 * 768 * 0.005 ** 2 / 2
    assert all(abs(expected - loss) < 0.0035 for loss in logged)
    x = torch.randn(1, 500, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = -model.lm_head(F.rms_norm(x, (48,)), None).log_softmax(-1).mean().item()  # over all targets
    rise = slope[1].item() ** 2 * 48 * 0.005 ** 2 / 2
    assert abs(found - math.log(1280) - rise) < 0.1 * rise


@pytest.mark.feature("model.attn.value_embed")
def test_value_tables_of_zero_leave_the_values_alone():
    model = built(*LATE, scramble=False)
    assert all(not table.any() for table in model.values.tables)
    v = torch.randn(2, 96, 6, 8, dtype=torch.float64)
    assert torch.equal(model.values.begin(text())(8, v, None), v)


# ----- MLP

@pytest.mark.feature("model.mlp.activation")
def test_swiglu_is_its_formula_with_as_many_parameters():
    relu_sq, model = built(), built("model.mlp.activation=swiglu")
    counts = [sum(p.numel() for p in m.blocks[3].mlp.parameters()) for m in (relu_sq, model)]
    mlp, x = model.blocks[3].mlp, torch.randn(2, 5, 48, dtype=torch.float64)
    assert counts[0] == counts[1] and mlp.c_fc.shape == mlp.gate.shape == (128, 48)
    gate = x @ mlp.gate.T
    assert same(mlp(x), (gate * torch.sigmoid(gate) * (x @ mlp.c_fc.T)) @ mlp.c_proj.T)
    with pytest.raises(UserError, match="has no bias vectors"):
        settings("model.mlp.activation=swiglu", ref="short/1")
    with pytest.raises(UserError, match="is for dense MLPs"):
        settings("model.mlp.activation=swiglu", ref="variants/1")


def test_the_router_begins_with_the_spread_that_is_given():
    routers = [
        built(f"model.mlp.moe.router_init={spread}", ref="variants/1", scramble=False).routers()[0].weight
        for spread in (1.0, 0.25)]
    assert torch.allclose(routers[1], 0.25 * routers[0], rtol=1e-6)
    assert abs(routers[0].std().item() * math.sqrt(48) - 1) < 0.1


# ----- head and losses

@pytest.mark.feature("model.head.softcap.shift")
@pytest.mark.parametrize("kernel", ["whole", "chunks"])
def test_the_asymmetric_cap_is_its_formula_with_its_gradient(kernel):
    generator = torch.Generator().manual_seed(0)
    sets = ["model.head.softcap.cap=23.0", "model.head.softcap.shift=5.0", "model.head.logit_scale=rsqrt_dim"]
    model = built(*LATE, *sets, f"system.kernels.loss={kernel}")
    x = 20 * torch.randn(2, 17, 48, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(BOS, (2, 17), generator=generator)
    z = x @ model.lm_head.weight.T / math.sqrt(48)
    capped = (23 * torch.sigmoid((z + 5) / 7.5)).flatten(0, 1)
    expected = F.cross_entropy(capped, targets.flatten(), reduction="none")
    found = model.lm_head.losses(x, None, targets).flatten()
    assert same(found, expected)
    wanted, got = (torch.autograd.grad(y.sum(), [x, model.lm_head.weight]) for y in (expected, found))
    assert all(same(a, b) for a, b in zip(wanted, got))
    assert Softcap().shift == 0.0


@pytest.mark.feature("model.head.mtp")
def test_further_targets_may_be_scored_in_chunks_and_cross_documents():
    """Trap: the target after the next is counted across documents, and not beyond the end of the row."""
    weights, x = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64), text()
    found = []
    for kernel in ("whole", "chunks"):
        model = built(*LATE, f"system.kernels.loss={kernel}")
        context = model.context(x, BOS, schedule.windows(model.settings, 0))
        found.append(model(x, x.roll(-1, 1), context, target_weights=weights))
    assert same(*found)
    log_p, y = logits(model, x).log_softmax(-1), x.roll(-1, 1)
    t = 18  # the second and third targets lie in the next document
    expected = -sum(w * log_p[:, t, y[:, t + n]].diagonal() for n, w in enumerate(weights))
    assert y[0, t + 1] == BOS and same(found[0][:, t], expected)
    assert same(found[0][:, -1], -log_p[:, -1, y[:, -1]].diagonal())


@pytest.mark.feature("model.head.mtp")
@pytest.mark.parametrize("value, message", [
    ("{start=[[1.0]], end=[[1.0, 0.5]]}", "as many weights"), ("{start=[], end=[]}", "one list of weights"),
    ("{start=[[1.0], [1.0]], end=[[1.0], [1.0]]}", "one list of weights"),
    ("{start=[[]], end=[[]]}", "a list of weights is empty"),
    ("{start=[[0.0]], end=[[0.0]]}", "must be above 0 in every stage"),
    ("{start=[[1.0]], end=[[1.0]], full_mass=true}", "is about the second and later weights"),
    ("{start=[[1.0, -0.5]], end=[[1.0, 0.5]]}", "must be at least 0")])
def test_weights_of_targets_that_do_not_fit_are_refused(value, message):
    with pytest.raises(UserError, match=message):
        settings(f"model.head.mtp={value}")


MODULE = "model.head.mtp={start = [[1.0, 0.3]], end = [[1.0, 0.1]], module = true}"


def losses_of(model, x, weights):
    context = model.context(x, BOS, schedule.windows(model.settings, 0))
    return model(x, x.roll(-1, 1), context, target_weights=weights)


@pytest.mark.feature("model.head.mtp.module")
def test_the_mtp_module_predicts_the_second_next_token_within_documents():
    """The losses by hand: M [norm(h); norm(e of the next token)], one block, the head of the model."""
    model, x = built(MODULE), text()
    off = shared_state(built("model.head.mtp=false"), model)
    h = []
    model.norm.register_forward_pre_hook(lambda module, args: h.append(args[0]))
    found = losses_of(model, x, (1.0, 0.3)) - losses_of(off, x, None)
    mtp, y = model.mtp, x.roll(-1, 1)
    e = model.embed(y)
    z = torch.cat([mtp.h_norm(h[0]), mtp.e_norm(e)], -1) @ mtp.merge.T
    meta = model.context(x, BOS, schedule.windows(model.settings, 0)).layers[11]
    z = z + mtp.block.attn(mtp.block.attn_norm(z), mtp.block.rotary, None, meta)
    z = z + mtp.block.mlp(mtp.block.mlp_norm(z))
    log_p = model.lm_head(mtp.norm(z), None).log_softmax(-1)
    for r in range(2):
        for t in range(96):
            counted = t + 2 <= 96 and BOS not in x[r, t + 1:t + 3]
            expected = -0.3 * log_p[r, t, y[r, t + 1]] if counted else torch.zeros((), dtype=torch.float64)
            assert (found[r, t] - expected).abs() < 1e-11, (r, t)


@pytest.mark.feature("model.head.mtp.module")
def test_the_mtp_module_trains_with_the_model_and_is_gone_in_validation():
    model, x = built(MODULE), text()
    off = shared_state(built("model.head.mtp=false"), model)
    assert same(losses_of(model, x, None), losses_of(off, x, None))
    assert same(losses_of(model, x, (1.0, 0.0)), losses_of(off, x, (1.0,)))
    losses_of(model, x, torch.tensor([1.0, 0.3], dtype=torch.float64)).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    without_documents = built(MODULE, "model.attn.document_mask=false")
    found = losses_of(without_documents, x, (0.0, 1.0))
    assert found[:, :-1].all() and not found[:, -1].any()


@pytest.mark.feature("model.head.mtp.module")
@pytest.mark.parametrize("ref, value, message", [
    ("short/33", "{start=[[1.0, 0.5, 0.2]], end=[[1.0, 0.5, 0.2]], module=true}", "at most two weights"),
    ("short/1", "{module=true}", "has no row")])
def test_an_mtp_module_that_cannot_be_is_refused(ref, value, message):
    with pytest.raises(UserError, match=message):
        settings(f"model.head.mtp={value}", ref=ref)


@pytest.mark.feature("model.head.untied.tied_until")
def test_a_head_that_is_tied_at_first_is_the_tied_model_and_then_the_untied_one():
    x = text()
    model = built(*LATE, scramble=False)
    assert model.tied
    tied = shared_state(built(*LATE, "model.head.untied=false"), shared_state(model, built(*LATE)))
    untied = shared_state(built(*LATE, "model.head.untied=true"), model)
    with torch.no_grad():
        tied.embed.weight.copy_(model.lm_head.weight)
    assert tied.lm_head.weight is None and not untied.tied and not tied.tied
    assert same(logits(model, x), logits(tied, x)) and not same(logits(model, x), logits(untied, x))
    for m in (model, tied):
        logits(m, x).square().sum().backward()
    assert model.embed.weight.grad is None and same(model.lm_head.weight.grad, tied.embed.weight.grad)
    assert torch.equal(model.full_state_dict()["embed.weight"], model.lm_head.weight)
    assert {model.embed.weight.role, tied.embed.weight.role} == {"embed", "lm_head"}
    model.tied = False
    assert same(logits(model, x), logits(untied, x))
    assert torch.equal(model.full_state_dict()["embed.weight"], model.embed.weight)
    model.initialise(0)
    assert model.tied


@pytest.mark.feature("numerics.fp8_head")
def test_the_fp8_head_may_be_tied():
    """Record 51: the shared table gets the gradient of both uses, the head's through 8 bits."""
    sets = [*LATE, "model.head.untied=false", "numerics.fp8_head={x=4.48, w=298.6, grad=597.3}"]
    assert settings(*sets[:-1]).numerics.fp8_head is None
    model, plain = (built(*s, precision="float32", scramble=False) for s in (sets, sets[:-1]))
    for m in (model, plain):
        x = text()
        m(x, x.roll(-1, 1), m.context(x, BOS, schedule.windows(m.settings, 0))).mean().backward()
    a, b = model.embed.weight.grad, plain.embed.weight.grad
    assert not torch.equal(a, b) and (a - b).norm() < 0.2 * b.norm()


@pytest.mark.feature("numerics.loss", "numerics.eval_loss")
def test_logits_of_training_and_validation_have_their_own_dtypes():
    """Record 37: the cross entropy of training gets bfloat16 logits, that of validation float32."""
    s = settings("numerics.loss=bfloat16", "numerics.softcap=bfloat16", precision="record")
    head = Head(s)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 8, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    targets = torch.randint(BOS, (1, 8))
    for training, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        head.train(training)
        assert head(x, None).dtype == dtype and head.losses(x, None, targets).dtype == torch.float32
        assert head.losses(x, None, targets, (1.0, 0.5)).dtype == torch.float32


# ----- generation

@pytest.fixture(scope="module")
def late():
    """Record 53 with the gates of record 55 at micro, rows of 64 tokens, random weights."""
    sets = [*LATE, *GATED, "validation.seq_len=64", "validation.tokens=512"]
    model = built(*sets, precision="float32").eval()
    model.tied = False
    return model


@pytest.mark.feature("model.embed.smear", "model.attn.key_offset")
def test_the_cache_holds_what_smear_and_key_offset_need_of_the_token_before(late):
    """Over several contexts of 64 tokens: with the cache the same tokens are drawn as without."""
    asked = dict(vocab_size=BOS + 1, bos=BOS, temperature=0.8, seed=3)
    cached, plain = (sample.generate(late, [BOS, 5, 9], 150, cached=c, **asked)[0] for c in (True, False))
    assert cached == plain and len(set(cached)) > 20


def test_a_cached_token_has_the_logits_of_a_whole_pass():
    model, x = built(*LATE, *GATED).eval(), text(1, 40)
    windows = schedule.windows(model.settings, 0)
    with torch.no_grad():
        whole = model(x, context=model.context(x, BOS, windows))
        cache = model.new_cache()
        first = model(x[:, :30], context=model.context(x[:, :30], BOS, windows), cache=cache)
        rest = [
            model(x[:, i:i + 1], context=model.context(x[:, :i + 1], BOS, windows, cached=True), cache=cache)
            for i in range(30, 40)
        ]
    assert same(torch.cat([first, *rest], 1), whole)


@pytest.mark.feature("model.head.untied.tied_until")
def test_a_checkpoint_of_a_shared_table_is_sampled_as_it_was_trained(tmp_path):
    model = built(*LATE, precision="float32").eval()
    path = tmp_path / "checkpoint.pt"
    torch.save(
        {"model": model.full_state_dict(), "settings": schema.plain(model.settings), "tokenizer": "sample"},
        path,
    )
    loaded, _ = sample.load(path)
    assert model.tied and not loaded.tied
    with torch.no_grad():
        assert torch.equal(logits(model, text()), logits(loaded, text()))


# ----- refusals

@pytest.mark.parametrize(
    "sets, message",
    [
        (["model.residual.unet_skips.pairs=[[7, 4]]"], "must lead to a later layer"),
        (["model.residual.unet_skips.pairs=[[4, 12]]"], "names layer 12"),
        (["model.residual.unet_skips.pairs=[]"], "is empty"),
        (
            ["model.residual.unet_skips.pairs=[[0, 7]]", "model.attn.drop_layers=[0]"],
            "neither attention nor MLP",
        ),
        (["model.residual.backout={layer=12}"], "names layer 12"),
        (["model.residual.backout={layer=11}"], "is the last layer"),
        (["model.residual.unet_skips.pairs=[[3,6],[3,6]]"], "twice: keep one"),
        (["model.embed.smear={channels=49}"], "between 1 and model.model_dim"),
        (
            ["model.attn.key_offset=true", "model.attn.rope={half_truncated=false}"],
            "needs model.attn.rope.half_truncated",
        ),
        (["model.head.untied={tied_until=1.5}"], "must be at most 1"),
        (["model.head.untied={tied_until=0.5}", "model.embed.padded=false"], "one size"),
        (["model.head.untied={tied_until=0.5}", "numerics.head=bfloat16"], "one dtype"),
        (["model.head.softcap={form='tanh', shift=5.0}"], "needs model.head.softcap.form=sigmoid"),
    ],
)
def test_contradictions_are_refused_with_their_reason(sets, message):
    with pytest.raises(UserError, match=message):
        settings(*sets)


def test_without_the_pairs_eleven_layers_have_no_u_net():
    with pytest.raises(UserError, match="needs an even model.num_layers"):
        settings(*LATE, "model.residual.unet_skips.pairs=false")


@pytest.mark.parametrize("sets", [["model.attn.sa_lambdas=true"], ["model.init.qkv_bound=1.0"]])
def test_latent_attention_has_no_projections_to_scale(sets):
    more = ["model.init.scheme=uniform", *sets]
    with pytest.raises(UserError, match="which model.attn.latent replaces"):
        settings(*more, ref="variants/5")
