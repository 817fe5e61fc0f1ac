from torch import nn


def build_dropout(cfg):
    return nn.Dropout(cfg.get("drop_prob", 0.5))
