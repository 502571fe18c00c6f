"""makd-llm: a pretrained language model distilled into a low-rank student that summarises.

Importing the package makes `AutoConfig`, `AutoTokenizer` and `AutoModelForCausalLM` able to load
its low-rank models. transformers takes seconds to import, so that is not done here: it happens when
`AutoConfig.from_pretrained`, which all of them go through, is called for the first time.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _register_at_first_use(configuration_auto: ModuleType) -> None:
    """Have AutoConfig load our models' classes when it is asked for a config the first time."""
    auto_config = configuration_auto.AutoConfig
    original = auto_config.__dict__["from_pretrained"]

    def from_pretrained(cls, *args, **kwargs):  # type: ignore[no-untyped-def]
        auto_config.from_pretrained = original
        from makd_llm.models import modeling_lowrank  # noqa: F401  (importing it registers)

        return auto_config.from_pretrained(*args, **kwargs)

    auto_config.from_pretrained = classmethod(from_pretrained)


class _WhenTransformersLoads(MetaPathFinder):
    """Waits for transformers' AutoConfig to be imported, and steps aside."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != _AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            execute = loader.exec_module

            def execute_and_prepare(module: ModuleType) -> None:
                execute(module)
                _register_at_first_use(module)

            loader.exec_module = execute_and_prepare  # type: ignore[method-assign]
        return spec


if _AUTO_CONFIG in sys.modules:
    _register_at_first_use(sys.modules[_AUTO_CONFIG])
else:
    sys.meta_path.insert(0, _WhenTransformersLoads())
