"""GPU: pooled scan right? and times of its kernels by sizes."""
import itertools, json, os, sys, time, traceback
import torch
out=open(os.path.join(os.environ.get("OUT","."),"-".join(sys.argv[1:]).replace("/","_").replace(" ","")+".jsonl"),"w")
def say(**k):
    line=json.dumps(k); print(line,flush=True); out.write(line+"\n"); out.flush()
cuda=torch.cuda.is_available(); dev="cuda" if cuda else "cpu"
t0=time.time()
try: import pytest
except ImportError:
    class _Any:
        def __getattr__(self,n): return self
        def __call__(self,*a,**k): return a[0] if len(a)==1 and callable(a[0]) and not k else (lambda f:f)
    sys.modules["pytest"]=_Any()
from vim_kernels.triton_backend import plan, pooled
from vim_kernels import pooled_scan, bidirectional_scan, ScanWeights, NormWeights
from vim_backbone.lines import batch_lines
from tests.kernels.test_pooled_backends import check, CASES, picture
def correct():
    for name,(case,packed) in CASES.items():
        for col,norm in ((False,True),(True,False),(True,True)):
            try: check("triton",case,packed,32,16,12,4,by_column=col,norm=norm); ok=True
            except Exception as e: ok=repr(e)[:300]; 
            say(test=name,col=col,norm=norm,ok=ok,t=time.time()-t0)
    for dt in (torch.bfloat16,):
        for norm in (False,True):
            try: check("triton",[picture(9,8,30),picture(5,7)],True,384,16,24,4,by_column=True,norm=norm,dtype=dt,value=6e-3,gradient=1.5e-2); ok=True
            except Exception as e: ok=repr(e)[:300]
            say(test="bf16",norm=norm,ok=ok,t=time.time()-t0)
def weights(d,n=16,r=None):
    r=r or d//32
    g=torch.Generator().manual_seed(0); R=lambda *s: torch.randn(*s,generator=g)
    return ScanWeights(*(t.to(dev).requires_grad_() for t in (R(d,4)/2,R(d),R(r+2*n,d)/d**.5,R(d,r)/r**.5,R(d)-3,torch.log(torch.arange(1,n+1).float()).repeat(d,1),torch.ones(d))))
SHAPES={"B1024 enc":(16,(64,64),1024,1536),"B1024 dec":(16,(64,64),None,1024),"B224 enc":(256,(14,14),49,1536),"S1024 enc":(32,(64,64),1024,768)}
if not cuda: SHAPES={"tiny":(2,(4,4),4,64)}
def setup(shape):
    b,grid,v,d=SHAPES[shape]
    vis=None
    if v: vis=torch.stack([torch.randperm(grid[0]*grid[1],device=dev)[:v].sort().values for _ in range(b)])
    l=v or grid[0]*grid[1]
    xz=torch.randn(b,l,2*d,device=dev,dtype=torch.bfloat16 if cuda else torch.float32).requires_grad_()
    return xz,batch_lines(b,grid,torch.device(dev),visible=vis),weights(d),weights(d),NormWeights(torch.ones(d,device=dev,requires_grad=True),torch.zeros(d,device=dev,requires_grad=True))
def profile(fn,reps=5):
    if not cuda: fn(); return {}
    fn(); torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(reps): fn()
        torch.cuda.synchronize()
    return {e.key[:60]:round(e.self_device_time_total/reps,1) for e in p.key_averages() if e.self_device_time_total>0}
def whole():
    for shape in SHAPES:
        xz,lines,f,r,norm=setup(shape)
        for which in ("rows","columns"):
            for nm in (None,norm):
                if which=="rows" and nm is not None and shape!="B1024 enc": continue
                ln=getattr(lines,which)
                def step():
                    y=pooled_scan(xz,f,r,ln,norm=nm,backend="triton"); y.backward(y.detach())
                try: say(shape=shape,lines=which,norm=nm is not None,us=profile(step,3))
                except Exception as e: say(shape=shape,error=traceback.format_exc()[-600:])
        if cuda:
            def step():
                y=bidirectional_scan(xz,f,r,backend="triton"); y.backward(y.detach())
            say(shape=shape,full=True,us=profile(step,3))
P=plan.PooledSizes; C=plan.ConvolutionSizes
CANDS={"POOLED_LINES":[P(1,8,256,2),P(1,4,256,2),P(2,4,256,4),P(1,8,128,1),P(1,8,512,4),P(4,4,128,4)],
"POOLED_OUTPUT":[P(1,4,256,2),P(1,8,256,2),P(2,4,128,2),P(1,4,512,4),P(1,4,128,1),P(4,2,128,4)],
"POOLED_OUTPUT_BACKWARD":[P(1,4,256,2),P(1,4,128,1),P(1,2,256,2),P(1,4,512,4),P(2,4,128,2),P(4,2,128,4)],
"POOLED_NORM":[P(1,4,256,4),P(1,4,512,4),P(1,4,256,2),P(1,2,512,4),P(2,4,256,4),P(1,4,128,2),P(1,8,256,4)],
"POOLED_NORM_BACKWARD":[P(1,4,256,4),P(1,2,512,4),P(1,4,128,2),P(1,2,256,2),P(2,2,256,4),P(1,4,512,8)],
"POOLED_CONVOLUTION_BACKWARD":[C(2,6,128,4),C(2,4,128,4),C(1,6,128,2),C(1,8,128,2),C(2,6,256,4),C(1,8,256,4),C(1,6,128,1)]}
KERNEL={"POOLED_LINES":"pooled_lines","POOLED_OUTPUT":"pooled_output_kernel","POOLED_OUTPUT_BACKWARD":"pooled_output_backward","POOLED_NORM":"pooled_output_kernel","POOLED_NORM_BACKWARD":"pooled_output_backward","POOLED_CONVOLUTION_BACKWARD":"pooled_convolution_backward"}
def tune(shapes):
    target=plan.target(torch.device(dev))
    state={s:setup(s) for s in shapes}
    for table,cands in CANDS.items():
        old=getattr(plan,table)
        for c in cands:
            setattr(plan,table,dict(old)|{target:c})
            for s,(xz,lines,f,r,norm) in state.items():
                nm=norm if "NORM" in table else None
                def step():
                    y=pooled_scan(xz,f,r,lines.columns,norm=nm,backend="triton"); y.backward(y.detach())
                try: us=profile(step,3); got=[v for k,v in us.items() if KERNEL[table] in k]
                except Exception as e: got=repr(e)[:200]
                say(table=table,sizes=list(c),shape=s,us=got,t=time.time()-t0)
        setattr(plan,table,old)
if __name__=="__main__":
    for part in sys.argv[1:]:
        if part=="correct": correct()
        elif part=="whole": whole()
        elif part.startswith("warm"):
            k,n=map(int,part[4:].split("/")); cuda_reps=1
            SHAPES={"w":(2,(64,64),1024,1536)}
            flat=[(t,c) for t,cs in CANDS.items() for c in cs][k::n]
            CANDS={t:[c for u,c in flat if u==t] for t in CANDS}
            tune(["w"])
        else: tune([s for s in SHAPES if part in s] or list(SHAPES))
    say(done=True,t=time.time()-t0)
