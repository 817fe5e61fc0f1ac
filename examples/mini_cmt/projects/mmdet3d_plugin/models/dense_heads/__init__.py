from .cmt_head import CmtHead

__all__ = ["CmtHead"]
