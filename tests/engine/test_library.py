"""llama.cpp as it is loaded."""

import llama_cpp
import pytest

from agentd.engine.llamacpp.library import configured


def test_a_setting_that_llama_cpp_renamed_is_not_taken_in_silence() -> None:
    with pytest.raises(TypeError, match="no field 'use_mmap'"):
        configured(llama_cpp.llama_model_default_params(), use_mmap=True)
    assert configured(llama_cpp.llama_model_default_params(), vocab_only=True).vocab_only
