"""BERT with its classification head (Devlin et al., NAACL 2019). Norms follow the residual sums."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from transformers import BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer

from harness.models import ModelEntry, masks, pretrained
from harness.models.chain import Chain
from harness.models.layered import Cut, Layered
from harness.models.side import Side, SideStack, layers, narrow, places
from harness.techniques import ParallelAdapters
from harness.workload import Workload

MODEL = BertForSequenceClassification
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
NEEDS = {"is_decoder": False, "chunk_size_feed_forward": 0}
QUERIES_AND_VALUES = ("query", "value")
WIDTHS = ("hidden_size", "intermediate_size")

HEADS = ("num_attention_heads",)


def build(entry: ModelEntry, workload: Workload) -> Layered:
    return cut(pretrained.load(MODEL, entry, workload, DROPOUTS, NEEDS, QUERIES_AND_VALUES), workload)


def cut(root: BertForSequenceClassification, workload: Workload) -> Layered:
    """The model, with what the technique adds to it, as a chain of units."""
    side = _side(root, workload) if workload.technique == "parallel-adapters" else None
    chain = Chain(workload, side)
    chain.layer("embedding")
    chain.local("mask", "mask", ["attention_mask"], partial(masks.padding, dtype=chain.dtype))
    (hidden,) = chain.unit("tokens", "embedding", ["input_ids", "token_type_ids"], ["hidden"], root.bert.embeddings)
    hidden, state = layers(chain, "layer", root.bert.encoder.layer, hidden, partial(_layer, chain), side)
    chain.layer("head")
    if side is not None:
        hidden = side.leave(chain, state, hidden)
    return chain.close(
        root,
        inputs=["input_ids", "attention_mask", "token_type_ids"],
        reads=[hidden],
        head=lambda hidden: root.classifier(root.dropout(root.bert.pooler(hidden))),
        modules=[root.bert.pooler, root.dropout, root.classifier],
    )


def _side(root: BertForSequenceClassification, workload: Workload) -> Side:
    options, width = workload.chosen(ParallelAdapters), root.config.hidden_size
    config = narrow(root.config, WIDTHS, HEADS, options.reduction)
    (kept,) = places(options, config.num_hidden_layers)
    return Side(width, options, SideStack(width, options, kept, [BertLayer(config, index) for index in kept]))


def _layer(chain: Chain, layer: BertLayer, hidden: str) -> str:
    inner, attended, outer = layer.attention.self, layer.attention.output, layer.output

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return inner.query(x), inner.key(x), inner.value(x)

    def attention_connective(x: Tensor, residual: Tensor) -> Tensor:
        return attended.LayerNorm(attended.dropout(x) + residual)

    def mlp_connective(x: Tensor, residual: Tensor) -> Tensor:
        return outer.LayerNorm(outer.dropout(x) + residual)

    products, width, head = [inner.query, inner.key, inner.value], inner.all_head_size, inner.attention_head_size
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
    cut = Cut(width, head, rows=(attended.dense,))
    (x,) = chain.unit("projection", "projection", [context], ["projected"], attended.dense, cut=cut)
    x = chain.adapter(x, "attention", attended.dense.out_features)
    modules = [attended.dropout, attended.LayerNorm]
    (middle,) = chain.unit(
        "attention-connective", "connective", [x, hidden], ["attended"], attention_connective, modules
    )
    columns = outer.dense.in_features
    cut = Cut(columns, columns=(layer.intermediate.dense,))
    (x,) = chain.unit("mlp-in", "mlp-in", [middle], ["inner"], layer.intermediate, cut=cut)
    (x,) = chain.unit("mlp-out", "mlp-out", [x], ["outer"], outer.dense, cut=Cut(columns, rows=(outer.dense,)))
    x = chain.adapter(x, "mlp", outer.dense.out_features)
    modules = [outer.dropout, outer.LayerNorm]
    (hidden,) = chain.unit("mlp-connective", "connective", [x, middle], ["hidden"], mlp_connective, modules)
    return hidden
