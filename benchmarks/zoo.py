"""How much of other people's networks can be cut, and whether the cut is exact: those of timm and pytorchcv.

    pip install -r benchmarks/requirements.txt
    python benchmarks/zoo.py --kind cnn --markdown docs/networks.md
    python benchmarks/zoo.py --kind hybrid --prune-linear --prune-heads --markdown docs/networks.md
    python benchmarks/zoo.py --kind pytorchcv --markdown docs/networks.md
    python benchmarks/zoo.py resnet50 seresnet18 pytorchcv/fishnet99 --peer

Every network has random weights, norms and biases, float64, and the smallest image that it runs on. 30 % of its units, drawn at
random, are closed by gates and, in a copy, removed. "exact": both outputs agree to 1e-6; "protected": nothing may
be removed, with the reason; "refused": an error says why; "wrong": neither. Seconds are CPU seconds of graph and cut, one
thread, proof included; memory is the peak above the model. `--peer` prunes the same share of channels by Torch-Pruning
1.6.1, configured as its documentation says (heads and unwrapped parameters given, the classifier ignored), and says
whether the result runs.
"""

import argparse
import gc
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from taylor_pruning.errors import InputError
from taylor_pruning.surgery.graph import ChannelGraph
from taylor_pruning.surgery.proof import difference, draw_anew, tensors_of

SHARE = 0.3  # of the units, at random
EXACT = 1e-6
MOST = 90  # per cent of the filters
SIDES = (64, 96, 128, 160, 224, 256)
KINDS = {  # names, where one of every family is enough to know it
    "cnn": """
        resnet10t resnet18 resnet26t resnetaa34d resnetblur18 seresnet18 ecaresnet26t ecaresnetlight resnet50_gn
        resnetv2_18 resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn resnest14d resnest50d_1s4x24d
        res2net50_14w_8s res2next50 regnetx_002 regnety_002 regnetv_040 regnety_040_sgn efficientnet_b0
        efficientnet_lite0 efficientnet_b0_gn efficientnet_b0_g16_evos efficientnet_cc_b0_4e efficientnet_es
        efficientnet_blur_b0 efficientnet_x_b3 efficientnetv2_rw_t tf_efficientnet_b0 tf_efficientnetv2_b0 tf_mixnet_s
        mnasnet_050 spnasnet_100 fbnetc_100 mobilenetv1_100 mobilenetv2_035 mobilenet_edgetpu_v2_xs tinynet_e
        test_efficientnet_ln mobilenetv3_small_050 tf_mobilenetv3_small_minimal_100 lcnet_035 mobilenetv4_conv_small_035
        mobilenetv4_hybrid_medium_075 ghostnet_050 ghostnetv3_050 dla34 dla46_c dla46x_c dla60_res2net hrnet_w18_small
        ese_vovnet19b_slim_dw vovnet39a eca_vovnet39b cspresnet50 cspdarknet53 darknet17 darknetaa53 cs3darknet_focus_s
        cspnext_tiny repvgg_a0 mobileone_s0 gernet_s eca_resnext26ts gcresnext26ts seresnet33ts resnet51q resnet50_clip
        resnet50_mlp botnet26t_256 halonet26t eca_halonext26ts lambda_resnet26t haloregnetz_b convnext_atto
        convnextv2_atto convnext_zepto_rms convnext_tiny_hnf nf_regnet_b0 eca_nfnet_l0 test_nfnet tresnet_m tresnet_v2_l
        selecsls42 legacy_xception xception41 inception_v3 inception_v4 nasnetalarge dpn48b dpn68 legacy_seresnet18
        legacy_seresnext26_32x4d skresnet18 hardcorenas_a rexnet_100 densenet121 vgg11_bn hgnet_tiny lcnetv2_small
        inception_next_atto repvit_m0_9 starnet_s050 fasternet_t0 rdnet_tiny convmixer_768_32 visformer_tiny
        poolformer_s12 convformer_s18 focalnet_tiny_srf seresnext26d_32x4d ecaresnext26t_32x4d eca_resnet33ts
        gcresnet33ts resnetrs50 resnetblur50d cspresnext50 cs3sedarknet_xdw tf_efficientnet_lite0 gc_efficientnetv2_rw_t
        efficientnet_b0_g8_gn fbnetv3_b semnasnet_050 mnasnet_small mobilenetv3_large_075 mobilenetv4_conv_aa_medium
        ghostnetv2_100 repghostnet_050 hrnet_w18_small_v2 dla60x_c hgnetv2_b0 skresnext50_32x4d bat_resnext26ts
        sebotnet33ts_256 eca_botnext26ts_256 sehalonet33ts convnextv2_femto nf_resnet26 nf_seresnet26 nfnet_l0
        regnetz_005 regnetz_b16_evos lcnetv2_base mambaout_femto repvit_m1 poolformerv2_s12 rexnetr_100
    """,
    "hybrid": """
        coatnet_nano_rw_224 coatnet_bn_0_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256
        mobilevit_xxs mobilevitv2_050 edgenext_xx_small fastvit_t8 efficientvit_b0 levit_128s efficientformer_l1
        efficientformerv2_s0 shvit_s1 swiftformer_xs nextvit_small lowformer_b0 iformer_t efficientvim_m1 pvt_v2_b0
        davit_tiny gcvit_xxtiny vit_tiny_r_s16_p8_224 vit_tiny_patch16_224 deit_tiny_patch16_224
        swin_tiny_patch4_window7_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 caformer_s18 xcit_nano_12_p16_224
        pit_ti_224 coat_lite_tiny crossvit_9_240 mvitv2_tiny sequencer2d_s vitamin_small_224 twins_svt_small nest_tiny
        hiera_tiny_224 cpubone_nano csatv2 tiny_vit_5m_224 efficientvit_m0 efficientvit_l1 swinv2_tiny_window8_256
        swinv2_cr_tiny_ns_224 eva02_tiny_patch14_224 convit_tiny tnt_s_patch16_224 twins_pcpvt_small
        vit_relpos_small_patch16_224 hieradet_small levit_conv_128s gmixer_12_224
    """,
    "pytorchcv": """
        airnet50_1x64d_r16 airnext50_32x4d_r2 alexnet bagnet9 bam_resnet18 bninception cbam_resnet18 channelnet
        condensenet74_c4_g4 darknet_tiny darknet53 darts densenet121 diapreresnet10 diaresnet10 dicenet_wd5 diracnet18v2
        dla34 dpn68b drnc26 efficientnet_edge_small_b espnetv2_wd2 fastseresnet101b fbnet_cb fdmobilenet_wd4 fishnet99
        ghostnet hardnet39ds hrnet_w18_small_v1 ibnb_resnet50 ibn_densenet121 igcv3_wd4 irevnet301 isqrtcovresnet18
        menet108_8x1_g3 mixnet_s mnasnet_b1 mobilenet_wd4 mobilenetv2b_wd4 mobilenetv3_small_w7d20 msdnet22 nasnet_4a1056
        octresnet10_ad2 peleenet pnasnet5large polynet preresnet10 proxylessnas_cpu pyramidnet101_a360 regnetx002 regnety002
        resattnet56 resnesta18 resneta10 resnetd50b resnext14_16x4d revnet38 scnet50 selecsls42 senet16 sepreresnet10
        sharesnet18 shufflenet_g3_wd4 shufflenetv2_wd2 sknet50 sparsenet121 spnasnet squeezenet_v1_0 squeezeresnet_v1_0
        sqnxt23_w1 tresnet_m vgg11 vovnet27s xdensenet121_2 xception zfnet fractalnet_cifar10 nin_cifar10
        pyramidnet110_a48_cifar10 resdropresnet20_cifar10 rir_cifar10 ror3_56_cifar10 shakedropresnet20_cifar10
        shakeshakeresnet20_2x16d_cifar10 wrn16_10_cifar10 wrn20_10_1bit_cifar10 xdensenet40_2_k24_bc_cifar10
    """,
}


def build(name):
    """(network, example of two images), the smallest that runs."""
    torch.manual_seed(0)
    model, side, fixed = (from_pytorchcv if name.startswith("pytorchcv/") else from_timm)(name.rpartition("/")[2])
    model = model.double().eval()
    draw_anew(model, {id(p) for p in model.parameters() if p.dim() > 1})
    for size in [side] if fixed else [s for s in SIDES if s < side] + [side]:
        x = torch.randn(2, 3, size, size, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                model(x)
            return model, x
        except (RuntimeError, AssertionError):
            continue
    raise SystemExit(f"{name} runs on none of the sizes {SIDES}")


def from_timm(name):
    """(network, the side of its images, whether it takes no other)."""
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=11)
    return model, model.default_cfg["input_size"][-1], model.default_cfg.get("fixed_input_size")


def from_pytorchcv(name):
    """(network, the side of its images, whether it takes no other)."""
    from pytorchcv.model_provider import get_model

    model = get_model(name)
    return model, model.in_size[0], False


def resident(peak=False):
    """MB of the process at its peak since the last call with `peak`, which resets the peak (Linux only)."""
    if peak:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def random_units(graph):
    """A share of the units that leaves every layer a filter."""
    order = torch.randperm(len(graph.units), generator=torch.Generator().manual_seed(0)).tolist()
    left, chosen = {name: info.filters for name, info in graph.layers.items()}, []
    for unit in (graph.units[i] for i in order[: max(1, int(SHARE * len(order)))]):
        counts = Counter(name for name, _ in unit.filters)
        if all(left[name] > count for name, count in counts.items()):
            chosen.append(unit)
            for name, count in counts.items():
                left[name] -= count
    return chosen


def check(name, options):
    """One row: verdict, share of removable filters, seconds, MB above the model, main reason for the rest."""
    model, x = build(name)
    name = name.rpartition("/")[2]
    gc.collect()
    before = resident(peak=True)
    start = time.process_time()
    try:
        graph = ChannelGraph(model, x[:1], **options)
        chosen = random_units(graph) if graph.units else []
        smaller = graph.remove(chosen)
    except InputError as error:
        return [name, "refused", "", "", "", str(error).partition(", at ")[0]]  # without the path of the line
    seconds, memory = time.process_time() - start, resident() - before
    filters = sum(info.filters for info in graph.layers.values())
    free = sum(int(info.removable.sum()) for info in graph.layers.values())
    reasons = Counter()
    for info in graph.layers.values():
        if info.reason:
            reasons[info.reason.rpartition(" (")[0] or info.reason] += int((~info.removable).sum())
    verdict = "protected"
    if chosen:
        gates = torch.ones(len(graph.units), dtype=x.dtype)
        gates[[unit.index for unit in chosen]] = 0
        with torch.no_grad(), graph.gated(gates):
            expected = list(tensors_of(model(x)))
        with torch.no_grad():
            verdict = "exact" if difference(expected, list(tensors_of(smaller(x)))) <= EXACT else "wrong"
    reason = reasons.most_common(1)[0][0] if reasons else ""
    return [name, verdict, f"{100 * free / max(1, filters):.0f}", f"{seconds:.1f}", f"{memory:.0f}", reason]


def peer(name):
    """Torch-Pruning on the same share, by its documentation's settings: "runs", or the error."""
    import torch_pruning

    model, x = build(name)
    attention = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    classifier = model.get_classifier()
    raw = [(p, p.dim() - 1) for n, p in model.named_parameters() if n.rpartition(".")[2] in ("cls_token", "pos_embed")]
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model, x[:1], importance=torch_pruning.importance.RandomImportance(), pruning_ratio=SHARE,
            ignored_layers=[m for m in [classifier] if isinstance(m, nn.Module)], num_heads=attention, unwrapped_parameters=raw,
        )  # fmt: skip
        pruner.step()
        model(x)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    return "runs"


def section(kind, rows):
    """The rows as a part of docs/networks.md."""
    counts = Counter(row[1] for row in rows)
    lines = [f"{len(rows)} networks: {counts['exact']} exact, {counts['protected']} with nothing to remove, "
             f"{counts['refused']} refused, {counts['wrong']} wrong."]  # fmt: skip
    if kind != "hybrid":
        most = [row for row in rows if row[1] == "exact" and float(row[2]) >= MOST]
        lines[0] += f" In {len(most)} of them at least {MOST} % of the filters can go:"
        lines += ["", textwrap.fill(", ".join(row[0] for row in most) + ".", 120, break_on_hyphens=False), ""]
        lines += ["The others, with the share of filters that can go and the most frequent reason why others may not:"]
        lines += ["", "| network | filters that can go | reason |", "|---|---|---|"]
        lines += [f"| {row[0]} | {row[2] or 0} % | {row[5]} |" for row in rows if row not in most]
    else:
        lines += ["", "| network | filters and linear outputs that can go | CPU seconds | MB above the model | "
                  "most frequent reason for the rest |", "|---|---|---|---|---|"]  # fmt: skip
        lines += [f"| {row[0]} | {row[2] or 0} % | {row[3]} | {row[4]} | {row[5]} |" for row in sorted(rows)]
    return "\n".join(lines)


def write_section(path, kind, rows):
    """Replaces what stands in the file between the markers of that kind."""
    text = path.read_text()
    before, start, rest = text.partition(f"<!-- zoo {kind} -->\n")
    _, end, after = rest.partition(f"\n<!-- end of zoo {kind} -->")
    if not start or not end:
        raise SystemExit(f"{path} has no markers <!-- zoo {kind} --> and <!-- end of zoo {kind} -->")
    path.write_text(before + start + section(kind, rows) + end + after)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="timm's names, or pytorchcv/NAME; default: those of --kind")
    parser.add_argument("--kind", choices=KINDS, default="cnn")
    parser.add_argument("--prune-linear", action="store_true")
    parser.add_argument("--prune-heads", action="store_true")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning beside it")
    parser.add_argument("--markdown", type=Path, help="write the table between the markers of that file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = {"prune_linear": arguments.prune_linear, "prune_heads": arguments.prune_heads}
    rows = []
    prefix = "pytorchcv/" if arguments.kind == "pytorchcv" else ""
    names = [prefix + name for name in KINDS[arguments.kind].split()]
    for name in arguments.names or names:
        rows.append(check(name, options) + ([peer(name)] if arguments.peer else []))
        print("  ".join(rows[-1]), flush=True)
    verdicts = Counter(row[1] for row in rows)
    most = sum(row[1] == "exact" and float(row[2]) >= MOST for row in rows)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    summary = f"{len(rows)} networks: {summary}; {most} with {MOST} % of their filters or more."
    print(summary)
    if arguments.markdown:
        write_section(arguments.markdown, arguments.kind, rows)


if __name__ == "__main__":
    main()
