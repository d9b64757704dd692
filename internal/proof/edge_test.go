package proof

import (
	"bytes"
	"cmp"
	"context"
	"crypto/aes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/diameter"
	"github.com/kmehsm/kmehsm/internal/milenage"
	"github.com/kmehsm/kmehsm/internal/testproc"
	"github.com/kmehsm/kmehsm/kme"
)

// An edge is an MME at the network's edge, whichever its stack: what it asks, and what it makes of the answers. A zero
// option is what a home MME sends.
type edge interface {
	air(imsi string, vectors uint32, o options) aia
	ulr(imsi, imei string, payload []byte, attempt string, o options) ula
	mar(app uint32, user string, resync []byte, o options) maa
}

// options change a request.
type options struct {
	host, realm, plmn string // who asks, and where the device is
	plain             bool   // does not announce binding
	utran             uint32 // so many UTRAN and GERAN vectors, too
	resync, uresync   []byte // RAND || AUTS
}

// A vec is a vector of any kind: of GERAN's, xres is SRES and autn is Kc.
type vec struct{ rand, xres, autn []byte }

// What became of a request: lost is why an MME has nothing of an answer, or drops it.
type aia struct {
	lost               string
	result, control    uint32
	attempt            string
	eutran, utran, gsm []vec
}

type ula struct {
	lost   string
	result uint32
	status string // of Binding-Answer; empty: there is none
	nwSig  []byte
	data   bool // Subscription-Data
}

type maa struct {
	lost         string
	result       uint32
	authenticate [][]byte // RAND || AUTN
}

// Binding-Control.
const (
	clearOnly    = 1 // PROVISIONING_ONLY
	preprocessed = 2
)

// A lineEdge is freeDiameter with the test MME's extension.
type lineEdge struct{ *mme }

func (e lineEdge) ask(o options, command string, args ...string) (fields []string, lost string) {
	for key, value := range map[string]string{"host": o.host, "realm": o.realm, "plmn": o.plmn,
		"uresync": hex.EncodeToString(o.uresync)} {
		if value != "" {
			args = append(args, key+"="+value)
		}
	}
	if o.plain {
		args = append(args, "plain")
	}
	if o.utran > 0 {
		args = append(args, fmt.Sprintf("utran=%d", o.utran))
	}
	f := e.mme.ask(command, args...)
	if f[0] == "ERR" {
		return nil, strings.Join(f[1:], " ")
	}
	return f[1:], ""
}

func number(s string) uint32 {
	n, _ := strconv.ParseUint(s, 10, 32)
	return uint32(n)
}

// word is a word of a line, in which "-" is none. (An attempt may begin with one.)
func word(s string) string {
	if s == "-" {
		return ""
	}
	return s
}

// unhex gives nil for "-".
func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		return nil
	}
	return b
}

func hexOr(b []byte) string {
	if b == nil {
		return "-"
	}
	return hex.EncodeToString(b)
}

func (e lineEdge) air(imsi string, vectors uint32, o options) (a aia) {
	f, lost := e.ask(o, "AIR", imsi, fmt.Sprint(vectors), hexOr(o.resync))
	if a.lost = lost; lost != "" {
		return a
	}
	a.result, a.control, a.attempt = number(f[0]), number(f[1]), word(f[2])
	for _, v := range f[3:] {
		parts := strings.Split(v, ":")
		switch parts[0] {
		case "u":
			a.utran = append(a.utran, vec{unhex(parts[1]), unhex(parts[2]), unhex(parts[3])})
		case "g":
			a.gsm = append(a.gsm, vec{unhex(parts[1]), unhex(parts[2]), unhex(parts[3])})
		default:
			a.eutran = append(a.eutran, vec{unhex(parts[0]), unhex(parts[1]), unhex(parts[2])})
		}
	}
	return a
}

func (e lineEdge) ulr(imsi, imei string, payload []byte, attempt string, o options) (u ula) {
	if attempt == "" {
		attempt = "-"
	}
	f, lost := e.ask(o, "ULR", imsi, imei, hexOr(payload), attempt)
	if u.lost = lost; lost != "" {
		return u
	}
	u.result, u.status, u.nwSig, u.data = number(f[0]), word(f[1]), unhex(f[2]), f[3] == "data"
	return u
}

func (e lineEdge) mar(app uint32, user string, resync []byte, o options) (m maa) {
	name := map[uint32]string{diameter.Cx: "cx", diameter.SWx: "swx", diameter.Wx: "wx",
		diameter.Zh: "zh"}[app]
	f, lost := e.ask(o, "MAR", name, user, "2", hexOr(resync))
	if m.lost = lost; lost != "" {
		return m
	}
	m.result = number(f[0])
	for _, a := range f[1:] {
		m.authenticate = append(m.authenticate, unhex(a))
	}
	return m
}

// A peerEdge is our own stack.
type peerEdge struct {
	t *testing.T
	*diameter.Peer
}

// peer connects one, which the node must have among its peers.
func (n *node) peer(name string, handle func(p *diameter.Peer, request *diameter.Message)) peerEdge {
	n.d.t.Helper()
	id := identity(name)
	var p *diameter.Peer
	testproc.Await(n.d.t, name+" connected", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		var err error
		p, err = diameter.Dial(ctx, fmt.Sprintf("%s:%d", cmp.Or(n.d.host, "127.0.0.1"), n.d.port(n.name)), id,
			id[strings.Index(id, ".")+1:], handle)
		return err == nil
	})
	n.d.t.Cleanup(func() { p.Close() })
	return peerEdge{n.d.t, p}
}

// patience is how long an MME waits for an answer that should come.
const patience = 2 * testproc.Patience

func (e peerEdge) ask(m *diameter.Message, o options) (*diameter.Message, string) {
	for i, a := range m.AVPs {
		switch {
		case a.ID == diameter.OriginHost && o.host != "":
			m.AVPs[i] = diameter.Text(a.ID, o.host)
		case a.ID == diameter.OriginRealm && o.realm != "":
			m.AVPs[i] = diameter.Text(a.ID, o.realm)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	answer, err := e.Peer.Ask(ctx, m)
	if err != nil {
		return nil, err.Error()
	}
	if fault := diameter.Fault(answer); fault != "" {
		return answer, fmt.Sprintf("dropped %s (result %d)", fault, answer.Result())
	}
	return answer, ""
}

func (o options) avps() []diameter.AVP {
	plmn := o.plmn
	if plmn == "" {
		plmn = "00101"
	}
	avps := []diameter.AVP{diameter.PLMN(plmn)}
	if !o.plain {
		avps = append(avps, diameter.Features())
	}
	return avps
}

func vecs(m *diameter.Message, kind, xres, autn diameter.ID) (all []vec) {
	for _, a := range m.All(diameter.AuthInfo, kind) {
		in, _ := diameter.ParseAVPs(a.Data)
		v := &diameter.Message{AVPs: in}
		all = append(all, vec{v.Data(diameter.RAND), v.Data(xres), v.Data(autn)})
	}
	return all
}

func (e peerEdge) air(imsi string, vectors uint32, o options) (a aia) {
	avps := o.avps()
	if o.utran > 0 {
		wanted := []diameter.AVP{diameter.Number(diameter.NumberOfVectors, o.utran)}
		if o.uresync != nil {
			wanted = append(wanted, diameter.New(diameter.ResyncInfo, o.uresync))
		}
		avps = append(avps, diameter.Group(diameter.RequestedUTRAN, wanted...))
	}
	request := e.AIR(realm, imsi, vectors, o.resync, avps...)
	if vectors == 0 && o.resync == nil {
		request.AVPs = request.AVPs[:len(request.AVPs)-1]
	}
	m, lost := e.ask(request, o)
	if a.lost = lost; lost != "" {
		return a
	}
	a.result = m.Result()
	a.control, _ = m.Number(diameter.BindingControl)
	a.attempt = string(m.Data(diameter.BindingAttempt))
	a.eutran = vecs(m, diameter.EUTRANVector, diameter.XRES, diameter.AUTN)
	a.utran = vecs(m, diameter.UTRANVector, diameter.XRES, diameter.AUTN)
	a.gsm = vecs(m, diameter.GERANVector, diameter.SRES, diameter.Kc)
	return a
}

func (e peerEdge) ulr(imsi, imei string, payload []byte, attempt string, o options) (u ula) {
	m, lost := e.ask(e.ULR(realm, imsi, imei, payload, attempt, o.avps()...), o)
	if u.lost = lost; lost != "" {
		return u
	}
	u.result, u.nwSig, u.data = m.Result(), m.Data(diameter.BindingAnswer, diameter.NWSig),
		m.Data(diameter.SubscriptionData) != nil
	if n, ok := m.Number(diameter.BindingAnswer, diameter.BindingStatus); ok {
		u.status = fmt.Sprint(n)
	}
	if u.result == 2001 && !u.data && u.status == "" {
		u.lost = "dropped no Subscription-Data"
	}
	return u
}

func (e peerEdge) mar(app uint32, user string, resync []byte, o options) (r maa) {
	m, lost := e.ask(e.MAR(app, realm, user, 2, resync), o)
	if r.lost = lost; lost != "" {
		return r
	}
	r.result = m.Result()
	for _, a := range m.All(diameter.SIPAuthDataItem, diameter.SIPAuthenticate) {
		r.authenticate = append(r.authenticate, a.Data)
	}
	return r
}

// A phone is a device with a subscriber's SIM in it. It holds the KME that it has compared NW_SIG of.
type phone struct {
	d    *network
	imsi string
	device
	sim *milenage.SIM
	kme *kme.Secret
}

// phone gives a device and a subscriber that nobody else has had. A subscriber with a mark may be given instead.
func (d *network) phone(imsi ...string) *phone {
	d.t.Helper()
	if d.devicesLeft == nil {
		d.devicesLeft = d.devices()
	}
	sim, err := milenage.New(unhex(operatorK), unhex(operatorO))
	if err != nil || len(d.devicesLeft) == 0 {
		d.t.Fatalf("%d devices are left, %v", len(d.devicesLeft), err)
	}
	p := &phone{d: d, device: d.devicesLeft[0], sim: sim, imsi: fmt.Sprintf("00101%010d", d.made-len(d.devicesLeft))}
	d.devicesLeft = d.devicesLeft[1:]
	if len(imsi) > 0 {
		p.imsi = imsi[0]
	}
	return p
}

// payload is what the device makes for one attempt.
func (p *phone) payload() (*kme.Plaintext, []byte) {
	plain := p.d.plaintext(p.device)
	return plain, p.d.encrypt(p.device, plain)
}

// decrypt gives the RAND that the phone's SIM gets.
func (p *phone) decrypt(rand []byte) (out [16]byte) {
	p.d.t.Helper()
	if p.kme == nil || len(rand) != 16 {
		p.d.t.Fatalf("%s: a RAND of %d bytes, and a KME: %v", p.imsi, len(rand), p.kme != nil)
	}
	block, err := aes.NewCipher(p.kme.Bytes())
	if err != nil {
		p.d.t.Fatal(err)
	}
	block.Decrypt(out[:], rand)
	return out
}

// accepts is AKA of a vector: whether the SIM accepts it and the network RES. The RAND is decrypted under KME, or is
// taken as it is.
func (p *phone) accepts(v vec, clear bool) error {
	p.d.t.Helper()
	rand := [16]byte(v.rand)
	if !clear {
		rand = p.decrypt(v.rand)
	}
	res, _, err := p.sim.Authenticate(rand, v.autn)
	if err == nil && !bytes.Equal(res[:], v.xres) {
		err = fmt.Errorf("RES is %x, XRES %x", res, v.xres)
	}
	return err
}

// binding is what keysvc says of an IMSI; empty: it is not bound.
func (d *network) binding(imsi string) (state, imei string) {
	d.t.Helper()
	r, err := d.http.Post("http://keysvc/kme.v1.KeyService/GetBinding", "application/json",
		strings.NewReader(`{"imsi":"`+imsi+`"}`))
	if err != nil {
		d.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	var answer struct{ State, IMEI string }
	if err == nil {
		err = json.Unmarshal(body, &answer)
	}
	if err != nil || r.StatusCode != http.StatusOK && !bytes.Contains(body, []byte("NOT_BOUND")) {
		d.t.Fatalf("GetBinding %s: %s, %v", imsi, r.Status, err)
	}
	return answer.State, answer.IMEI
}
