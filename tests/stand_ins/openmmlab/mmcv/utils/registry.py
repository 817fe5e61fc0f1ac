def build_from_cfg(cfg, registry, default_args=None):
    args = {**(default_args or {}), **cfg}
    kind = args.pop("type")
    cls = registry.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise KeyError(f"{kind} is not in the {registry.name} registry")
    return cls(**args)


class Registry:
    def __init__(self, name):
        self.name = name
        self._module_dict = {}

    def get(self, key):
        return self._module_dict.get(key)

    def build(self, cfg, **default_args):
        return build_from_cfg(cfg, self, default_args)

    def _register_module(self, module, module_name=None, force=False):
        name = module_name or module.__name__
        if not force and name in self._module_dict:
            raise KeyError(f"{name} is already registered in {self.name}")
        self._module_dict[name] = module

    def register_module(self, name=None, force=False, module=None):
        if module is not None:
            self._register_module(module, name, force)
            return module

        def register(cls):
            self._register_module(cls, name, force)
            return cls

        return register
