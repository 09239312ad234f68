import importlib.util, functools, os, tempfile
from mhc_compile.codegen.render import render
D="/tmp/kc"; os.makedirs(D, exist_ok=True)
@functools.cache
def load(spec):
    p=f"{D}/k_{spec.op}_{spec.key}.py"
    t=f"{p}.{os.getpid()}"; open(t,"w").write(render(spec)); os.replace(t,p)
    s=importlib.util.spec_from_file_location(f"k_{spec.op}_{spec.key}",p); m=importlib.util.module_from_spec(s); s.loader.exec_module(m)
    return m.kernel
