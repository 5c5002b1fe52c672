"""Loads a checkpoint whose linears are factored: `y = up(down(x)) + bias` where `config.low_rank` names a linear.

Written by Attar beside the weights. Load it with
    AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
or, without trust_remote_code, with this file on the path:
    from modeling_attar import FactoredForCausalLM
    FactoredForCausalLM.from_pretrained(PATH)
"""
from torch import nn
from transformers import BASE_CLASS


class FactoredLinear(nn.Module):
    """Two thin linears in the place of one; the bias of the whole belongs to the module itself."""

    def __init__(self, linear, rank):
        super().__init__()
        options = dict(bias=False, device=linear.weight.device, dtype=linear.weight.dtype)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.down = nn.Linear(linear.in_features, rank, **options)
        self.up = nn.Linear(rank, linear.out_features, **options)
        self.bias = linear.bias

    def forward(self, x):
        y = self.up(self.down(x))
        return y if self.bias is None else y + self.bias


class FactoredForCausalLM(BASE_CLASS):
    def __init__(self, config):
        super().__init__(config)
        for name, rank in config.low_rank.items():
            parent, _, child = name.rpartition(".")
            parent = self.get_submodule(parent)
            setattr(parent, child, FactoredLinear(getattr(parent, child), rank))
