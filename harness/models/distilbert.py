"""DistilBERT with its classification head (Sanh et al., arXiv 1910.01108). Norms follow the residual sums."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional
from transformers import DistilBertForSequenceClassification
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from harness.models import ModelEntry, masks, pretrained
from harness.models.chain import Chain
from harness.models.layered import Cut, Layered
from harness.models.side import Side, SideStack, layers, narrow, places
from harness.techniques import ParallelAdapters
from harness.workload import Workload

MODEL = DistilBertForSequenceClassification
DROPOUTS = ("dropout", "attention_dropout", "seq_classif_dropout")
NEEDS = {"chunk_size_feed_forward": 0}
QUERIES_AND_VALUES = ("q_lin", "v_lin")
WIDTHS = ("dim", "hidden_dim")

HEADS = ("n_heads",)


def build(entry: ModelEntry, workload: Workload) -> Layered:
    return cut(pretrained.load(MODEL, entry, workload, DROPOUTS, NEEDS, QUERIES_AND_VALUES), workload)


def cut(root: DistilBertForSequenceClassification, workload: Workload) -> Layered:
    """The model, with what the technique adds to it, as a chain of units."""
    side = _side(root, workload) if workload.technique == "parallel-adapters" else None
    chain = Chain(workload, side)
    chain.layer("embedding")
    chain.local("mask", "mask", ["attention_mask"], partial(masks.padding, dtype=chain.dtype))
    (hidden,) = chain.unit("tokens", "embedding", ["input_ids"], ["hidden"], root.distilbert.embeddings)
    hidden, state = layers(chain, "layer", root.distilbert.transformer.layer, hidden, partial(_layer, chain), side)
    chain.layer("head")
    if side is not None:
        hidden = side.leave(chain, state, hidden)

    def head(hidden: Tensor) -> Tensor:
        return root.classifier(root.dropout(functional.relu(root.pre_classifier(hidden[:, 0]))))

    modules = [root.pre_classifier, root.dropout, root.classifier]
    return chain.close(root, ["input_ids", "attention_mask"], [hidden], head, modules)


def _side(root: DistilBertForSequenceClassification, workload: Workload) -> Side:
    options, width = workload.chosen(ParallelAdapters), root.config.dim
    config = narrow(root.config, WIDTHS, HEADS, options.reduction)
    (kept,) = places(options, config.n_layers)
    return Side(width, options, SideStack(width, options, kept, [TransformerBlock(config) for _ in kept]))


def _layer(chain: Chain, layer: TransformerBlock, hidden: str) -> str:
    inner, ffn = layer.attention, layer.ffn

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return inner.q_lin(x), inner.k_lin(x), inner.v_lin(x)

    def attention_connective(x: Tensor, residual: Tensor) -> Tensor:
        return layer.sa_layer_norm(x + residual)

    def mlp_in(x: Tensor) -> Tensor:
        return ffn.activation(ffn.lin1(x))

    def mlp_connective(x: Tensor, residual: Tensor) -> Tensor:
        return layer.output_layer_norm(ffn.dropout(x) + residual)

    products, width, head = [inner.q_lin, inner.k_lin, inner.v_lin], inner.dim, inner.attention_head_size
    cut = Cut(width, head, columns=tuple(products))
    q, k, v = chain.unit("qkv", "qkv", [hidden], ["q", "k", "v"], qkv, products, cut=cut)
    context = chain.attend(
        q,
        k,
        v,
        inner,
        head_dim=head,
        scaling=inner.scaling,
        dropout=inner.dropout.p,
        mask="mask",
        width=width,
    )
    cut = Cut(width, head, rows=(inner.out_lin,))
    (x,) = chain.unit("projection", "projection", [context], ["projected"], inner.out_lin, cut=cut)
    x = chain.adapter(x, "attention", inner.out_lin.out_features)
    (middle,) = chain.unit(
        "attention-connective", "connective", [x, hidden], ["attended"], attention_connective, [layer.sa_layer_norm]
    )
    columns = ffn.lin1.out_features
    cut = Cut(columns, columns=(ffn.lin1,))
    (x,) = chain.unit("mlp-in", "mlp-in", [middle], ["inner"], mlp_in, [ffn.lin1, ffn.activation], cut=cut)
    (x,) = chain.unit("mlp-out", "mlp-out", [x], ["outer"], ffn.lin2, cut=Cut(columns, rows=(ffn.lin2,)))
    x = chain.adapter(x, "mlp", ffn.lin2.out_features)
    modules = [ffn.dropout, layer.output_layer_norm]
    (hidden,) = chain.unit("mlp-connective", "connective", [x, middle], ["hidden"], mlp_connective, modules)
    return hidden
