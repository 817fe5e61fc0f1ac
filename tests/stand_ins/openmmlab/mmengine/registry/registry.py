class Registry:
    def __init__(self, name):
        self.name = name
        self._module_dict = {}

    def get(self, key):
        return self._module_dict.get(key)

    def build(self, cfg):
        args = dict(cfg)
        return self.get(args.pop("type"))(**args)

    def _register_module(self, module, module_name=None, force=False):
        names = [module_name] if isinstance(module_name, str) else module_name or [module.__name__]
        for name in names:
            if not force and name in self._module_dict:
                raise KeyError(f"{name} is already registered in {self.name}")
            self._module_dict[name] = module

    def register_module(self, name=None, force=False, module=None):
        if module is not None:
            self._register_module(module=module, module_name=name, force=force)
            return module

        def register(module):
            self._register_module(module=module, module_name=name, force=force)
            return module

        return register
