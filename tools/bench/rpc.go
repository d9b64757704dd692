package main

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/emptypb"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/client"
	"github.com/kmehsm/kmehsm/internal/config"
	"github.com/kmehsm/kmehsm/internal/mesim"
	"github.com/kmehsm/kmehsm/internal/scheduling"
	"github.com/kmehsm/kmehsm/kme"
	"github.com/kmehsm/kmehsm/tools/bench/measure"
)

// rpc has three figures of each call: NAME_per_second, over mutual TLS, with 64 calls at once; and the CPU time of one
// call, in keysvc and in the client: NAME_cpu_us and NAME_client_cpu_us.
//
// "empty" is Check of gRPC's health service. It uses the same server, TLS, HTTP/2 and library as unary calls, and does
// no work, except that it asks the token once a second whether it works. Package client makes the other calls.
// "refused" is PrepareVector without a RAND, which does no work either. "prepare", "report" and "check_equipment" are
// for subscriptions whose bindings are ACTIVE, as in later attaches and authentications of a device.
type rpc map[string]float64

func (b *bench) rpc(r *report) error {
	s, err := b.serve("keysvc")
	if err != nil {
		return err
	}
	var result rpc
	err = b.inChild(&result, []string{"rpc", "-server", s.address, "-pid", strconv.Itoa(s.cmd.Process.Pid)})
	if err == nil {
		r.RPC = result
	}
	return errors.Join(err, s.stop())
}

// active is the number of subscriptions that the calls are for.
const active = 1000

var rpcCalls = []string{"empty", "refused", "prepare", "report", "check_equipment"}

// atOnce is the number of calls at the same time, as in mesim load.
const atOnce = 64

func (b *bench) measureRPC() (any, error) {
	tls, err := config.ClientTLS(b.clientFiles())
	if err != nil {
		return nil, err
	}
	hss, err := client.New(client.Options{URLs: []string{b.server}, TLS: tls, Timeout: 30 * time.Second, Tries: 1})
	if err != nil {
		return nil, err
	}
	defer hss.Close()
	subscriptions, devices, err := b.attached(hss)
	if err != nil {
		return nil, err
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	transport := &http.Transport{Protocols: protocols, TLSClientConfig: tls}
	defer transport.CloseIdleConnections()
	// The messages are HealthCheckRequest and HealthCheckResponse. Their fields are not read, so Empty can stand for
	// them.
	check := connect.NewClient[emptypb.Empty, emptypb.Empty](&http.Client{Transport: transport},
		b.server+"/grpc.health.v1.Health/Check")

	_ = scheduling.ForCalls(0) // as mesim load
	calls := map[string]func(kme.IMSI) error{
		"empty": func(kme.IMSI) error {
			_, err := check.CallUnary(b.ctx, connect.NewRequest(new(emptypb.Empty)))
			return err
		},
		"refused": func(imsi kme.IMSI) error {
			_, err := hss.PrepareVector(b.ctx, imsi, client.Origin{})
			if errors.Is(err, client.Reason(kme.Malformed)) {
				return nil
			}
			return fmt.Errorf("a vector without a RAND: %w", err)
		},
		"prepare": func(imsi kme.IMSI) error {
			v, err := hss.PrepareVector(b.ctx, imsi, client.Origin{}, client.RAND{1})
			if err == nil && v.AttemptID != "" {
				err = fmt.Errorf("IMSI %s is not bound", imsi)
			}
			return err
		},
		"report": func(imsi kme.IMSI) error {
			report, err := hss.ReportAuthentication(b.ctx, imsi, client.Origin{}, true)
			if err == nil && report.State != kmev1.State_ACTIVE {
				err = fmt.Errorf("the binding of IMSI %s is %v, not ACTIVE", imsi, report.State)
			}
			return err
		},
		"check_equipment": func(imsi kme.IMSI) error {
			e, err := hss.CheckEquipment(b.ctx, devices[imsi], imsi)
			if err == nil && e.Status != kmev1.EquipmentStatus_WHITELISTED {
				err = fmt.Errorf("IMEI %s is %v (%v) for IMSI %s", devices[imsi], e.Status, e.Reason, imsi)
			}
			return err
		},
	}
	all := map[string][]sample{}
	for i := range b.fewer() {
		for _, name := range rpcCalls {
			s, err := b.call(subscriptions, calls[name])
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			all[name] = append(all[name], s)
			b.progress("RPC, %s, %d of %d: %.0f a second, %.0f us of keysvc's CPU, %.0f us of the client's", name, i+1,
				b.fewer(), s.PerSecond, s.cpu, s.ClientCPU)
		}
	}
	result := rpc{}
	for name, s := range all {
		result[name+"_per_second"] = measure.Round(medianOf(s, func(s sample) float64 { return s.PerSecond }), 0)
		result[name+"_cpu_us"] = measure.Round(medianOf(s, func(s sample) float64 { return s.cpu }), 1)
		result[name+"_client_cpu_us"] = measure.Round(medianOf(s, func(s sample) float64 { return s.ClientCPU }), 1)
	}
	return result, nil
}

// attached attaches devices, and gives their subscriptions, whose bindings are ACTIVE, and the device of each.
func (b *bench) attached(hss *client.Client) (all []kme.IMSI, of map[kme.IMSI]kme.IMEI, err error) {
	fleet, err := b.fleet()
	if err != nil {
		return nil, nil, err
	}
	devices, err := fleet.Devices(b.ctx, 0, active)
	if err != nil {
		return nil, nil, err
	}
	of = map[kme.IMSI]kme.IMEI{}
	first := time.Now().Unix() % 1e6 * active // others than those of a run before
	for i := range active {
		imsi, err := kme.ParseIMSI(fmt.Sprintf("00101%010d", first+int64(i)))
		if err != nil {
			return nil, nil, err
		}
		all, of[imsi] = append(all, imsi), devices[i].IMEI
	}
	run := mesim.Run{Network: mesim.Network{Client: hss}, Devices: devices, FirstIMSI: all[0], Concurrency: atOnce}
	_, err = run.Attach(b.ctx, "")
	return all, of, err
}

// call measures a call for b.each.
func (b *bench) call(subscriptions []kme.IMSI, call func(kme.IMSI) error) (s sample, err error) {
	before, err := measure.ProcessCPU(b.pid)
	if err != nil {
		return s, err
	}
	own, start := mesim.CPUTime(), time.Now()
	var n atomic.Int64
	if err := measure.ParallelOn(atOnce, func(i int) (bool, error) {
		n.Add(1)
		return time.Since(start) < b.each, call(subscriptions[i%len(subscriptions)])
	}); err != nil {
		return s, err
	}
	seconds, calls := time.Since(start).Seconds(), float64(n.Load())
	spent := mesim.CPUTime() - own
	after, err := measure.ProcessCPU(b.pid)
	return sample{PerSecond: calls / seconds, ClientCPU: float64(spent.Microseconds()) / calls,
		cpu: float64((after - before).Microseconds()) / calls}, err
}
