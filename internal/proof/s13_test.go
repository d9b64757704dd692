package proof

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/diameter"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

// An eca is what became of a ME-Identity-Check-Request: its result, and Equipment-Status, -1 without one.
type eca struct {
	result uint32
	status int
}

const (
	whitelisted = iota
	blacklisted
	greylisted
	noStatus = -1
)

// ecr asks for what Terminal-Information says, and an IMSI unless it is empty.
func (e peerEdge) ecr(imsi string, terminal ...diameter.AVP) eca {
	e.t.Helper()
	request := e.Start(diameter.S13, diameter.MEIdentityCheck, realm, imsi,
		diameter.Group(diameter.TerminalInformation, terminal...))
	if imsi == "" {
		for i, a := range request.AVPs {
			if a.ID == diameter.UserName {
				request.AVPs = append(request.AVPs[:i:i], request.AVPs[i+1:]...)
				break
			}
		}
	}
	return e.eca(request)
}

func (e peerEdge) eca(request *diameter.Message) eca {
	e.t.Helper()
	m, lost := e.ask(request, options{})
	if lost != "" {
		e.t.Errorf("lost: %s", lost)
		return eca{0, noStatus}
	}
	if status, ok := m.Number(diameter.EquipmentStatus); ok {
		return eca{m.Result(), int(status)}
	}
	return eca{m.Result(), noStatus}
}

func imeiAVP(digits string) diameter.AVP { return diameter.Text(diameter.IMEI, digits) }

// S13 in a daemon of its own and in the HSS's: what an MME is told of a device before and after it has proven itself;
// what is refused; and that S6a goes on beside it.
func TestS6aS13(t *testing.T) {
	t.Parallel()
	d := newNetwork(t, 3, "")
	hss := d.start("hss", []string{"hssd:" + d.path("subscribers"), d.conf("kme.conf", "s13 = serve")}, "mme")
	// Calls wait for a keysvc that hangs until the breaker is open.
	eir := d.start("eir", []string{d.conf("kme-eir.conf", "s13 = serve", "timeout_ms = 6000")}, "mme2")
	s := &scene{network: d, hss: hss, front: hss, own: hss.peer("mme", nil)}
	own := eir.peer("mme2", nil)
	p, other := d.phone(), d.phone()
	meid := diameter.Text(diameter.MEID, "A0000012345678")
	edges := map[string]peerEdge{"the HSS": s.own, "a daemon of its own": own}
	for where, edge := range edges {
		if got := edge.ecr(p.imsi, imeiAVP(p.imei)); got != (eca{2001, greylisted}) {
			t.Errorf("%s: not proven: %v", where, got)
		}
	}
	p.bind(s, s.own, options{})
	for where, edge := range edges {
		for what, ask := range map[string]struct {
			imsi     string
			terminal []diameter.AVP
			want     eca
		}{
			"proven": {p.imsi, []diameter.AVP{imeiAVP(p.imei)}, eca{2001, whitelisted}},
			"proven, with a Software-Version": {p.imsi, []diameter.AVP{imeiAVP(p.imei),
				diameter.Text(diameter.SoftwareVersion, "01")}, eca{2001, whitelisted}},
			"proven, with a spare digit":    {p.imsi, []diameter.AVP{imeiAVP(p.imei + "0")}, eca{2001, whitelisted}},
			"proven, without an IMSI":       {"", []diameter.AVP{imeiAVP(p.imei)}, eca{2001, whitelisted}},
			"another device":                {p.imsi, []diameter.AVP{imeiAVP(other.imei)}, eca{2001, blacklisted}},
			"a device that could be proven": {other.imsi, []diameter.AVP{imeiAVP(other.imei)}, eca{2001, greylisted}},
			"a MEID":                        {p.imsi, []diameter.AVP{meid}, eca{5422, noStatus}},
			"a MEID beside an IMEI":         {p.imsi, []diameter.AVP{imeiAVP(p.imei), meid}, eca{2001, whitelisted}},
			"a wrong check digit": {p.imsi, []diameter.AVP{imeiAVP(p.imei + wrongDigit(p.imei))},
				eca{5004, noStatus}},
			"an IMEI too short":             {p.imsi, []diameter.AVP{imeiAVP(p.imei[1:])}, eca{5004, noStatus}},
			"an IMEI too long":              {p.imsi, []diameter.AVP{imeiAVP(p.imei + "123")}, eca{5004, noStatus}},
			"an IMEI of letters":            {p.imsi, []diameter.AVP{imeiAVP("3520990000000x")}, eca{5004, noStatus}},
			"an empty Terminal-Information": {p.imsi, nil, eca{5005, noStatus}},
			"a User-Name that is no IMSI":   {"user@example.org", []diameter.AVP{imeiAVP(p.imei)}, eca{5004, noStatus}},
		} {
			if got := edge.ecr(ask.imsi, ask.terminal...); got != ask.want {
				t.Errorf("%s: %s: %v, want %v", where, what, got, ask.want)
			}
		}
		none := edge.Start(diameter.S13, diameter.MEIdentityCheck, realm, p.imsi)
		if got := edge.eca(none); got != (eca{5005, noStatus}) {
			t.Errorf("no Terminal-Information: %v", got)
		}
	}

	// Without the setting it is none.
	off := d.start("off", []string{d.conf("kme-off.conf")}, "mme3").peer("mme3", nil)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	m, err := off.Ask(ctx, off.Start(diameter.S13, diameter.MEIdentityCheck, realm, p.imsi,
		diameter.Group(diameter.TerminalInformation, imeiAVP(p.imei))))
	if err != nil || m.Result()/1000 != 3 || m.Data(diameter.EquipmentStatus) != nil {
		t.Errorf("a daemon without s13: %v, %+v", err, m)
	}

	// Many at once.
	const callers, each = 20, 100
	var all sync.WaitGroup
	var wrong atomic.Int64
	for range callers {
		all.Go(func() {
			for range each {
				if got := own.ecr(p.imsi, imeiAVP(p.imei)); got != (eca{2001, whitelisted}) {
					wrong.Add(1)
				}
			}
		})
	}
	all.Wait()
	if n := wrong.Load(); n > 0 {
		t.Errorf("%d of %d are not answered as one alone", n, callers*each)
	}
	p.authenticates(s, s.own, options{})

	// keysvc hangs, ends and comes back.
	away := func(what string) {
		t.Helper()
		for range 5 {
			if got := own.ecr(p.imsi, imeiAVP(p.imei)); got != (eca{5012, noStatus}) {
				t.Errorf("%s: %v", what, got)
			}
		}
		start := time.Now()
		if got := own.ecr(p.imsi, imeiAVP(p.imei)); got.result != 5012 ||
			time.Since(start) > patience/2 {
			t.Errorf("%s: %v after %v, though the breaker is open", what, got, time.Since(start))
		}
	}
	back := func() {
		t.Helper()
		testproc.Await(t, "S13 is back", func() bool {
			return own.ecr(p.imsi, imeiAVP(p.imei)) == eca{2001, whitelisted}
		})
	}
	d.suspend()
	away("it hangs")
	d.keysvc.Cmd.Process.Signal(syscall.SIGCONT)
	back()
	d.keysvc.Kill()
	away("it is gone")
	d.startKeysvc()
	back()
	eir.stop()
	if text := eir.Log.String(); !strings.Contains(text, " checked ") || strings.Contains(text, " checked 0 ") {
		t.Errorf("no counter at the end:\n%s", text)
	}
}

func wrongDigit(imei string) string {
	sum := 0
	for i, c := range imei {
		d := int(c - '0')
		if i%2 == 1 {
			d = d*2/10 + d*2%10
		}
		sum += d
	}
	return fmt.Sprint(1 + (10-sum%10)%10%9) // neither the check digit nor 0
}

// Whatever a broken MME asks gets an answer, or none, and no sanitizer has anything to say.
func TestS6aS13Malformed(t *testing.T) {
	t.Parallel()
	const tgpp = 10415
	d := newNetwork(t, 2, "address,undefined")
	hss := d.start("hss", []string{"hssd:" + d.path("subscribers"), d.conf("kme.conf", "s13 = serve")}, "mme")
	p := d.phone()
	imei := []byte(p.imei)
	deep := []byte("x")
	for range 1500 {
		deep = avp(1401, tgpp, deep, 0)
	}
	for what, terminals := range map[string][][]byte{ // what is in each Terminal-Information
		"an empty IMEI":             {avp(1402, tgpp, nil, 0)},
		"an IMEI of 60 kB":          {avp(1402, tgpp, bytes.Repeat(imei, 4000), 0)},
		"an IMEI's length":          {avp(1402, tgpp, imei, 40)},
		"an IMEI's short length":    {avp(1402, tgpp, imei, -8)},
		"an IMEI's length zero":     {avp(1402, tgpp, imei, -26)},
		"an IMEI with a zero":       {avp(1402, tgpp, []byte("3520990\x00000001"), 0)},
		"an IMEI of quotes":         {avp(1402, tgpp, []byte(`35","imsi":"1`), 0)},
		"a thousand IMEIs":          {bytes.Repeat(avp(1402, tgpp, imei, 0), 1000)},
		"rubbish":                   {bytes.Repeat([]byte{0xff}, 300)},
		"half a header":             {{0, 0, 5}},
		"terminals in terminals":    {deep},
		"two terminals":             {avp(1402, tgpp, imei, 0), avp(1402, tgpp, imei, 0)},
		"a MEID's length":           {avp(1471, tgpp, imei, 400)},
		"an IMEI of another vendor": {avp(1402, 9, imei, 0)},
	} {
		edge := hss.peer("mme", nil)
		request := edge.Start(diameter.S13, diameter.MEIdentityCheck, realm, p.imsi)
		for _, data := range terminals {
			request.AVPs = append(request.AVPs, diameter.New(diameter.TerminalInformation, data))
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		m, err := edge.Ask(ctx, request)
		cancel()
		if err != nil || m.Result() == 2001 || m.Data(diameter.EquipmentStatus) != nil {
			t.Errorf("%s: %v, %+v", what, err, m)
		}
		edge.Close()
	}
	if got := hss.peer("mme", nil).ecr(p.imsi, imeiAVP(p.imei)); got != (eca{2001, greylisted}) {
		t.Errorf("afterwards: %v", got)
	}
	hss.Kill()
	if text := hss.Log.String(); strings.Contains(text, "Sanitizer") || strings.Contains(text, "runtime error") {
		t.Errorf("%s", text[max(0, len(text)-6000):])
	}
}
