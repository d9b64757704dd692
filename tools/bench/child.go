package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/faultmodule"
	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/kme"
	"github.com/kmehsm/kmehsm/tools/bench/measure"
)

// child measures one thing in this process, and prints it as JSON. It is for what needs a process of its own, because
// of its memory or of the module that it loads.
func (b *bench) child(name string) error {
	f := map[string]func() (any, error){"lookup": b.measureLookup, "calls": b.countCalls,
		"network": b.measureNetworkHSM, "rpc": b.measureRPC}[name]
	if f == nil {
		return fmt.Errorf("there is no child %q", name)
	}
	result, err := f()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

func (b *bench) inChild(result any, child []string, env ...string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(b.ctx, self, append([]string{"-dir", b.dir, "-pairs", strconv.Itoa(b.pairs), "-seconds",
		strconv.Itoa(int(b.each.Seconds())), "-child"}, child...)...)
	cmd.Env, cmd.Stderr = append(os.Environ(), env...), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	return json.Unmarshal(out, result)
}

type lookup struct {
	Lots       int     `json:"lots"`
	Devices    int     `json:"devices"`
	Cached     float64 `json:"cached_per_second"`
	RSS        float64 `json:"rss_mb"`
	ReadsACold float64 `json:"reads_a_cold_lookup"`
}

func (b *bench) lookup(r *report) error { return b.inChild(&r.Lookup, []string{"lookup"}) }

// generated is a directory that makes each shard when it is read, of the same 256 keys, and counts the reads.
type generated struct {
	directory.Store // nil: only Read is called
	signer          *directory.Signer
	manifests       map[string]*directory.Manifest
	keys            []directory.DeviceKey
	shards          atomic.Int64
}

func (g *generated) Read(_ context.Context, path string) ([]byte, string, error) {
	parts := strings.Split(path, "/") // lots/LOT/shards/NUMBER
	if len(parts) == 3 {              // lots/LOT/revocations
		list := directory.Revocations{Lot: parts[1], Version: 1}
		jws, err := g.signer.Sign(directory.TypeRevocations, list)
		return jws, "1", err
	}
	if len(parts) != 4 {
		return nil, "", directory.ErrNotFound
	}
	m := g.manifests[parts[1]]
	n, err := strconv.Atoi(parts[3])
	if m == nil || err != nil {
		return nil, "", directory.ErrNotFound
	}
	g.shards.Add(1)
	first, count := m.ShardRange(n)
	keys := make([]directory.DeviceKey, count)
	for i := range keys {
		keys[i] = directory.DeviceKey{IMEI: m.IMEI(first + i), Key: g.keys[i].Key}
	}
	shard, err := directory.NewShard(m, n, keys, make([]byte, sha256.Size))
	if err != nil {
		return nil, "", err
	}
	jws, err := g.signer.Sign(directory.TypeShard, shard)
	return jws, "1", err
}

const lots, devicesALot, shardSize = 100, 100_000, 256

func (b *bench) measureLookup() (any, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	signer, err := directory.NewSigner(key)
	if err != nil {
		return nil, err
	}
	lot, err := b.lot("2048")
	if err != nil {
		return nil, err
	}
	g := &generated{signer: signer, manifests: map[string]*directory.Manifest{}}
	for range shardSize {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		g.keys = append(g.keys, directory.DeviceKey{Key: &k.PublicKey})
	}
	var served []*registry.Lot
	for i := range lots {
		m := *lot
		tac, err := kme.ParseTAC(fmt.Sprintf("35%06d", i))
		if err != nil {
			return nil, err
		}
		m.Lot, m.Manufacturer, m.ShardSize = fmt.Sprintf("G%d", i), signer.KeyID(), shardSize
		m.Ranges = []directory.Range{{TAC: tac, First: 0, Count: devicesALot}}
		g.manifests[m.Lot] = &m
		served = append(served, &registry.Lot{Manufacturer: m.Manufacturer, Manifest: &m})
	}
	reader := directory.NewReader(g, directory.NewVerifier(signer.Public()), directory.ReaderOptions{})
	index, err := registry.NewLots(served, map[string]*directory.Reader{signer.KeyID(): reader})
	if err != nil {
		return nil, err
	}
	look := func(i int) error {
		_, _, err := index.Device(b.ctx, served[i/devicesALot].Manifest.IMEI(i%devicesALot))
		return err
	}
	// The cache cannot hold so many shards. One device of each is looked up.
	const cold = 5000
	if err := measure.Parallel(func(i int) (bool, error) {
		return i < cold, look(i * 1999 % (lots * devicesALot))
	}); err != nil {
		return nil, err
	}
	result := lookup{Lots: lots, Devices: lots * devicesALot, ReadsACold: float64(g.shards.Load()) / cold}
	// The shards of these devices are cached, since they are looked up again and again.
	const hot = 1000
	cached := func() error { return look((cold - 1 - mathrand.IntN(hot)) * 1999 % (lots * devicesALot)) }
	if err := measure.Parallel(func(i int) (bool, error) { return i < 20*hot, cached() }); err != nil {
		return nil, err
	}
	var n atomic.Int64
	start := time.Now()
	before := g.shards.Load()
	if err := measure.Parallel(func(i int) (bool, error) {
		for range 1000 {
			if err := cached(); err != nil {
				return false, err
			}
		}
		n.Add(1000)
		return time.Since(start) < b.each, nil
	}); err != nil {
		return nil, err
	}
	result.Cached = measure.Round(float64(n.Load())/time.Since(start).Seconds(), 0)
	if read := g.shards.Load() - before; read > 0 {
		return nil, fmt.Errorf("%d shards were read while cached devices were looked up", read)
	}
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return nil, err
	}
	result.RSS = measure.Round(float64(usage.Maxrss)/1024, 0)
	return result, nil
}

// A networkHSM has the figures of hsmkeys with a simulated HSM in a network: each call takes 1 ms, and the HSM takes
// 5,000 calls and 1,000 RSA operations a second. It does not compute a decryption a second time, so that the cores of
// this machine are not the limit.
type networkHSM struct {
	Sessions  int     `json:"sessions"`
	PerSecond float64 `json:"establish_per_second"`
	Calls     float64 `json:"calls"` // of each, with those that close sessions
	Share     float64 `json:"share"` // of the calls that it takes
	HalfP50   float64 `json:"half_p50_ms"`
	HalfP99   float64 `json:"half_p99_ms"`
}

const networkCalls, networkLine = 5000, "network 1000 5000 1000"

// roundTrips are the calls of the module that an operation makes, and how many of them come one after the other.
type roundTrips struct{ Calls, Depth map[string]int }

// hsmCalls counts the calls of operations. The module that injects faults passes them on, and makes the token as far
// away as one in a network.
func (b *bench) hsmCalls(r *report) error {
	path, _, err := p11.ModuleOf(os.Getenv("OPERATOR_TOKEN"))
	if err != nil {
		return err
	}
	module, err := faultmodule.Build(b.dir, path)
	if err != nil {
		return err
	}
	// hsmkeys makes calls at the same time only if the token is far away when it is opened.
	if err := module.Set(farAway); err != nil {
		return err
	}
	var trips roundTrips
	r.NetworkHSM = nil
	err = errors.Join(b.inChild(&trips, []string{"calls"}, module.Env()...),
		b.inChild(&r.NetworkHSM, []string{"network"}, module.Env()...), module.Set())
	r.HSMCalls, r.HSMDepth = trips.Calls, trips.Depth
	return err
}

const farAway = "* delay 1000"

// through gives the URI of a token of the environment through the fault module of this process, and that module.
func (b *bench) through(variable string) (uri string, module *faultmodule.Module, err error) {
	uri = os.Getenv(variable)
	path, _, err := p11.ModuleOf(uri)
	if err != nil {
		return "", nil, err
	}
	module, err = faultmodule.Built(b.dir, path)
	if err != nil {
		return "", nil, err
	}
	return module.URI(uri), module, nil
}

// aPayload makes a payload that the token processes in full and rejects: nobody has signed what it decrypts to.
func (b *bench) aPayload() (p hsmkeys.Payload, err error) {
	m, err := b.lot("2048")
	if err != nil {
		return p, err
	}
	device, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return p, err
	}
	p = hsmkeys.Payload{Suite: m.Suite, Lot: hsmkeys.Key{Role: hsmkeys.RoleLot, Manufacturer: m.Manufacturer,
		Name: m.Lot}, N: m.PublicKey(), Device: &device.PublicKey, Bytes: make([]byte, len(m.N))}
	_, err = io.ReadFull(rand.Reader, p.Bytes[1:])
	return p, err
}

func (b *bench) countCalls() (any, error) {
	payload, err := b.aPayload()
	if err != nil {
		return nil, err
	}
	uri, module, err := b.through("OPERATOR_TOKEN")
	if err != nil {
		return nil, err
	}
	operator, err := hsmkeys.OpenOperator(b.ctx, uri, hsmkeys.Options{})
	if err != nil {
		return nil, err
	}
	defer operator.Close()
	opened, err := operator.OpenPayload(b.ctx, payload)
	if err != nil {
		return nil, err
	}
	if uri, _, err = b.through("FACTORY_TOKEN"); err != nil {
		return nil, err
	}
	factory, err := hsmkeys.OpenFactory(b.ctx, uri, hsmkeys.Options{})
	if err != nil {
		return nil, err
	}
	defer factory.Close()
	injection := hsmkeys.Key{Role: hsmkeys.RoleInjection, Manufacturer: b.manufacturer, Name: "bench"}
	trips := roundTrips{Calls: map[string]int{}, Depth: map[string]int{}}
	for name, do := range map[string]func() error{
		"open payload": func() error { _, err := operator.OpenPayload(b.ctx, payload); return err },
		"encrypt 32 RANDs": func() error {
			_, err := operator.EncryptRANDs(b.ctx, opened.Sealed, make([]hsmkeys.RAND, 32))
			return err
		},
		"ping": func() error { return operator.Ping(b.ctx) },
		"make device key": func() error {
			_, _, err := factory.MakeDeviceKey(b.ctx, kme.SuiteECDSA, injection)
			return err
		},
	} {
		const times = 64 // so often, all sessions are used, and were opened before
		for range times {
			if err := do(); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		before := total(module)
		for range times {
			if err := do(); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		trips.Calls[name] = int(math.Round(float64(total(module)-before) / times))
		if trips.Depth[name], err = depth(module, do); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return trips, nil
}

// depth is how many calls of an operation come one after the other. It is the least of several runs: a busy machine may
// begin a call late that could run beside another one. The calls take long enough to overlap.
func depth(module *faultmodule.Module, do func() error) (int, error) {
	if err := module.Set("* delay 10000"); err != nil {
		return 0, err
	}
	least := uint64(math.MaxInt)
	for range 10 {
		_, n, err := module.Of(do)
		if err != nil {
			return 0, err
		}
		least = min(least, n)
	}
	return int(least), module.Set(farAway)
}

func total(m *faultmodule.Module) (n int) {
	for _, calls := range m.Counts() {
		n += int(calls)
	}
	return n
}

func (b *bench) measureNetworkHSM() (any, error) {
	payload, err := b.aPayload()
	if err != nil {
		return nil, err
	}
	uri, module, err := b.through("OPERATOR_TOKEN")
	if err != nil {
		return nil, err
	}
	if err := module.Set(networkLine, "replay"); err != nil {
		return nil, err
	}
	var all []networkHSM
	for _, sessions := range []int{64, 256} {
		token, err := hsmkeys.OpenOperator(b.ctx, uri, hsmkeys.Options{Sessions: sessions})
		if err != nil {
			return nil, err
		}
		_ = scheduling.ForCalls(token.Sessions()) // as keysvc does
		n, err := b.onNetwork(token, module, payload)
		if err := errors.Join(err, token.Close()); err != nil {
			return nil, err
		}
		n.Sessions = sessions
		all = append(all, n)
	}
	return all, nil
}

func (b *bench) onNetwork(
	token *hsmkeys.OperatorToken, module *faultmodule.Module, payload hsmkeys.Payload,
) (r networkHSM, err error) {
	var mu sync.Mutex
	var times []float64
	start := time.Now()
	open := func(due time.Time) error {
		_, err := token.OpenPayload(b.ctx, payload)
		mu.Lock()
		defer mu.Unlock()
		times = append(times, float64(time.Since(due).Microseconds())/1000)
		return err
	}
	// First all sessions are opened, and all handles found.
	if err := measure.ParallelOn(token.Sessions(), func(i int) (bool, error) {
		return i < 4*token.Sessions(), open(start)
	}); err != nil {
		return r, err
	}
	times, start = nil, time.Now()
	before := total(module)
	if err := measure.ParallelOn(atOnce, func(int) (bool, error) {
		return time.Since(start) < b.each, open(time.Now())
	}); err != nil {
		return r, err
	}
	seconds, calls := time.Since(start).Seconds(), float64(total(module)-before)
	r.PerSecond, r.Calls = measure.Round(float64(len(times))/seconds, 1), measure.Round(calls/float64(len(times)), 2)
	r.Share = measure.Round(calls/seconds/networkCalls, 3)

	pause := time.Duration(float64(time.Second) * r.Calls / networkCalls * 2)
	times, start = nil, time.Now()
	if err := measure.ParallelOn(atOnce, func(i int) (bool, error) {
		due := start.Add(time.Duration(i) * pause)
		time.Sleep(time.Until(due))
		return due.Sub(start) < b.each, open(due)
	}); err != nil {
		return r, err
	}
	slices.Sort(times)
	r.HalfP50, r.HalfP99 = times[len(times)/2], times[len(times)*99/100]
	return r, nil
}
