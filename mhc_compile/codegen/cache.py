import importlib.util, functools, os, tempfile
from mhc_compile.codegen.render import render
D=tempfile.mkdtemp()
@functools.cache
def load(spec):
    p=f"{D}/k_{spec.op}_{spec.key}.py"
    open(p,"w").write(render(spec))
    s=importlib.util.spec_from_file_location(f"k_{spec.op}_{spec.key}",p); m=importlib.util.module_from_spec(s); s.loader.exec_module(m)
    return m.kernel
