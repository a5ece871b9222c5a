"Weights files: exactly one network, whole or absent, and no code from strangers"
import copy, json, os
import numpy as np, pytest, torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from udanb.core import seed_all
from udanb.weights import load_into, load_weights, plain, save_weights, strip, weights_hash

def make(seed=0):
    seed_all(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))

def same(a, b): return list(a)==list(b) and all(a[k].equal(b[k]) and a[k].dtype==b[k].dtype for k in b)

@pytest.fixture
def nets(): return make(0),make(1),make(2)

@pytest.fixture
def ckpt(nets):
    "The trainer's layout, with a real optimiser"
    s,t,e = nets
    opt = torch.optim.AdamW(s.parameters()); s(torch.randn(1,3,8,8)).sum().backward(); opt.step()
    return dict(it=7, model=s.state_dict(), opt=opt.state_dict(), sched=dict(last_epoch=7), recipe=json.dumps(dict(name='daformer')),
                method={f'teacher.net.{k}':v for k,v in t.state_dict().items()} | {f'imnet.{k}':v for k,v in e.state_dict().items()} | {'teacher.it':torch.tensor(7)})

@pytest.fixture
def published(nets):
    "DAFormer's layout"
    return dict(meta={}, optimizer={}, state_dict={f'{p}.{k}':v for p,n in zip(('model','ema_model','imnet_model'),nets) for k,v in n.state_dict().items()})

# ---- strip
def test_strip_keeps_exactly_one_network(nets, ckpt, published):
    for c in (ckpt,published,published['state_dict']):
        assert same(strip(c), nets[0].state_dict()) and same(strip(c, 'teacher'), nets[1].state_dict())

def test_stripped_tensors_own_their_memory():
    base = torch.arange(24.).view(2,3,4)
    views = dict(a=base[0], b=base.transpose(0,2), c=base[0], d=nn.Parameter(base))
    s = strip(dict(model=views))
    for k,v in s.items(): assert v.device.type=='cpu' and v.is_contiguous() and v.equal(views[k]) and not v.requires_grad and type(v) is torch.Tensor
    assert len({v.untyped_storage().data_ptr() for v in s.values()})==4 and s['a'].untyped_storage().nbytes()==48
    base.zero_()
    assert s['a'].sum()>0

def test_strip_errors(ckpt, nets):
    with pytest.raises(ValueError, match="unknown network 'techer'; did you mean 'teacher'"): strip(ckpt, 'techer')
    with pytest.raises(ValueError, match='no teacher; it holds it, model'): strip({**ckpt, 'method':{}}, 'teacher')
    with pytest.raises(ValueError, match='no student; it holds 0.weight'): strip(nets[0].state_dict())

def test_strip_knows_ddbs_names(nets, tmp_path):
    "Distillation's student and its two teachers; mmcv leaves a numpy number in `meta`"
    state = {f'{p}.{k}':v for p,n in zip(('stu_model','cu_model','ca_model'),nets) for k,v in n.state_dict().items()}
    for which,n in zip(('student','cu','ca'),nets): assert same(strip(dict(state_dict=state), which), n.state_dict())
    torch.save(dict(meta=dict(hook_msgs=dict(best_score=np.float64(.5))), state_dict=state), tmp_path/'ddb.pth')
    assert same(load_weights(tmp_path/'ddb.pth', 'ca')[0], nets[2].state_dict())
    with pytest.raises(ValueError, match='no teacher'): load_weights(tmp_path/'ddb.pth', 'teacher')

# ---- files
def test_there_and_back(tmp_path, nets):
    f = save_weights(tmp_path/'runs'/'model.safetensors', nets[0], dict(space='camvid11', recipe=dict(tau=.968), miou=48.25))
    state,meta = load_weights(f)
    assert same({k:state[k] for k in nets[0].state_dict()}, nets[0].state_dict()) and set(state)==set(nets[0].state_dict())
    assert meta==dict(space='camvid11', recipe='{"tau": 0.968}', miou='48.25', hash=weights_hash(nets[0]))
    with safe_open(f, 'pt') as raw: assert raw.metadata()==meta                                 # readable by anybody
    assert [p.name for p in f.parent.iterdir()]==['model.safetensors']

def test_types_shapes_and_shared_tensors(tmp_path):
    w = torch.randn(3,4)
    state = dict(a=w, tied=w, t=w.T, h=w.half(), b=w.bfloat16(), i=torch.tensor(5), m=w>0, none=torch.zeros(0,3))
    back,_ = load_weights(save_weights(tmp_path/'m.safetensors', state))
    assert same({k:back[k] for k in state}, state)

def test_equal_weights_are_equal_files(tmp_path, nets):
    "Byte for byte, however the metadata was ordered; and still a file the library reads, aligned to 8 bytes"
    meta = dict(space='camvid11', name='straße "1"\n', recipe=dict(tau=.968), seed=0, b=1, a=2)
    files = [save_weights(tmp_path/f'{i}.safetensors', nets[0], dict(m)) for i,m in enumerate([meta.items(), [*reversed(meta.items())]]*3)]
    assert len({f.read_bytes() for f in files})==1
    assert int.from_bytes(files[0].read_bytes()[:8], 'little')%8==0
    with safe_open(files[0], 'pt') as raw:
        assert raw.metadata()['name']==meta['name'] and all(raw.get_tensor(k).equal(v) for k,v in nets[0].state_dict().items())

def test_hash_in_the_name(tmp_path, nets):
    a,b = (save_weights(tmp_path/'m.safetensors', n, hashed=True) for n in nets[:2])
    assert a.name==f'm-{weights_hash(nets[0])}.safetensors' and a!=b and a.exists() and b.exists()

def test_a_failed_save_leaves_the_old_file(tmp_path, nets, monkeypatch):
    f = save_weights(tmp_path/'m.safetensors', nets[0])
    old = f.read_bytes()
    def full(p, blob):
        p.write_bytes(blob[:100]); raise OSError(28, 'No space left on device')
    monkeypatch.setattr('udanb.weights._write', full)
    with pytest.raises(OSError, match='No space'): save_weights(f, nets[1])
    assert f.read_bytes()==old and [p.name for p in tmp_path.iterdir()]==['m.safetensors']

def test_loaded_tensors_outlive_their_file(tmp_path, nets):
    f = save_weights(tmp_path/'m.safetensors', nets[0])
    state,_ = load_weights(f)
    f.write_bytes(b'')
    assert weights_hash(state)==weights_hash(nets[0])

def test_a_truncated_file_is_named(tmp_path, nets):
    f = save_weights(tmp_path/'model.safetensors', nets[0])
    f.write_bytes(f.read_bytes()[:-1])
    with pytest.raises(ValueError, match='model.safetensors: not a whole safetensors file'): load_weights(f)

def test_a_flipped_bit_is_found(tmp_path, nets):
    f = save_weights(tmp_path/'m.safetensors', nets[0])
    data = bytearray(f.read_bytes()); data[-3] ^= 1; f.write_bytes(data)
    with pytest.raises(ValueError, match=f'not to {weights_hash(nets[0])} as when they were written'): load_weights(f)

def test_safetensors_of_others_need_no_hash(tmp_path, nets):
    save_file(plain(nets[0].state_dict()), tmp_path/'theirs.safetensors')
    state,meta = load_weights(tmp_path/'theirs.safetensors')
    assert meta=={} and weights_hash(state)==weights_hash(nets[0])

# ---- torch files
@pytest.mark.parametrize('suffix', ['.pth','.pt','.ckpt'])
def test_torch_files(tmp_path, nets, ckpt, published, suffix):
    f = tmp_path/f'x{suffix}'
    torch.save(nets[0].state_dict(), f)
    assert same(load_weights(f)[0], nets[0].state_dict())
    for c in (ckpt,published,published['state_dict']):
        torch.save(c, f)
        assert same(load_weights(f)[0], nets[0].state_dict()) and same(load_weights(f, 'teacher')[0], nets[1].state_dict())

def test_other_wrappings_and_mmcvs_meta(tmp_path, nets):
    "How files are opened and unwrapped is tested in test_state.py; what comes out of there comes out of here"
    s = nets[0].state_dict()
    for obj,meta in ((dict(model=s, epoch=800), {}), (dict(state_dict=s, meta=dict(CLASSES=('a','b'), hash='theirs')), dict(CLASSES=('a','b'), hash='theirs'))):
        torch.save(obj, tmp_path/'m.pth')
        state,m = load_weights(tmp_path/'m.pth')
        assert same(state, s) and m==meta
    with pytest.raises(ValueError, match='m.pth: there is no teacher in it; it holds one network'): load_weights(tmp_path/'m.pth', 'teacher')

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)

def test_code_is_refused_and_not_run(tmp_path):
    f,sprung = tmp_path/'stranger.pth',tmp_path/'sprung'
    torch.save(dict(model=make().state_dict(), method=Trap(str(sprung))), f)
    with pytest.raises(ValueError, match='stranger.pth: holds more than tensors.*save only the tensors'): load_weights(f)
    assert not sprung.exists()

def test_other_content_and_names(tmp_path, nets):
    for bad,kind in (([torch.ones(3)], 'list'), (dict(lr=.1), 'float'), (3, 'int')):
        torch.save(bad, tmp_path/'m.pth')
        with pytest.raises(ValueError, match=f'm.pth: not a dictionary of tensors but {kind}'): load_weights(tmp_path/'m.pth')
    with pytest.raises(FileNotFoundError, match='gone.pth: no such weights file'): load_weights(tmp_path/'gone.pth')
    (tmp_path/'m.zip').write_bytes(b'x')
    with pytest.raises(ValueError, match='m.zip: weights are read from'): load_weights(tmp_path/'m.zip')
    with pytest.raises(ValueError, match='written as .safetensors'): save_weights(tmp_path/'m.pth', nets[0])

def test_a_file_of_ours_is_one_network(tmp_path, nets):
    "Names that look like a prefix are left as they are; a file of one network has no teacher"
    wrapped = nn.ModuleDict(dict(model=nets[0], ema_model=nets[1]))
    f = save_weights(tmp_path/'m.safetensors', wrapped)
    assert weights_hash(load_weights(f)[0])==weights_hash(wrapped) and load_into(wrapped, f)['hash']==weights_hash(wrapped)
    with pytest.raises(ValueError, match='there is no teacher in it; it holds one network'): load_weights(save_weights(tmp_path/'n.safetensors', nets[0]), 'teacher')

def test_a_checkpoint_converted_to_safetensors(tmp_path, nets, published):
    "Without our hash its prefixes mean what they mean in a .pth"
    save_file(plain(published['state_dict']), tmp_path/'daformer.safetensors')
    for which,n in zip(('student','teacher','imagenet'), nets):
        assert weights_hash(load_weights(tmp_path/'daformer.safetensors', which)[0])==weights_hash(n)

# ---- into a network
def test_load_into_is_exact(tmp_path, nets, ckpt):
    net = make(9)
    assert load_into(net, save_weights(tmp_path/'m.safetensors', nets[1], dict(seed=1)))['seed']=='1'
    assert same(net.state_dict(), nets[1].state_dict())
    torch.save(ckpt, tmp_path/'c.pt')
    assert load_into(net, tmp_path/'c.pt')=={} and same(net.state_dict(), nets[0].state_dict())

@pytest.mark.parametrize('change,say', [
    (lambda s: s.pop('1.running_var'), '1 missing: 1.running_var'),
    (lambda s: s.update(extra=torch.ones(1)), '1 unexpected: extra'),
    (lambda s: s.update({'2.weight': torch.ones(5,4,1,1)}), r'1 mismatching: 2.weight \(5x4x1x1 in the file, 2x4x1x1 in the network\)'),
    (lambda s: s.update({f'k{i}': torch.ones(1) for i in range(9)}), '9 unexpected: k0, k1, k2, k3, k4, …')])
def test_all_or_nothing(tmp_path, nets, change, say):
    state = copy.copy(nets[0].state_dict()); change(state)
    net = make(9); before = weights_hash(net)
    with pytest.raises(ValueError, match=f'm.safetensors does not fit the network. {say}'): load_into(net, save_weights(tmp_path/'m.safetensors', state))
    assert weights_hash(net)==before
