package diameter

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"testing"
	"time"
)

func octets(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(strings.ReplaceAll(s, " ", ""), "\n", ""))
	if err != nil {
		panic(err)
	}
	return b
}

// The octets are those of docs/s6a.md, and a request of RFC 6733's header written by hand.
func TestOctets(t *testing.T) {
	for _, c := range []struct {
		name, want string
		avp        AVP
	}{
		{"Binding-Control", "00000007 80 000010 00007ed9 00000002", Number(BindingControl, 2)},
		{"padding", "00000003 80 00000d 00007ed9 41 000000", Text(BindingAttempt, "A")},
		{"M without a vendor", "00000001 40 000009 31 000000", Text(UserName, "1")},
		{"V and M", "00000586 c0 00000c 000028af", New(EUTRANVector, nil)},
		{"a group", "00000004 80 00001c 00007ed9  00000006 80 000010 00007ed9 00000000",
			Group(BindingAnswer, Number(BindingStatus, 0))},
	} {
		if got := appendAVPs(nil, []AVP{c.avp}); !bytes.Equal(got, octets(c.want)) {
			t.Errorf("%s: %x, want %s", c.name, got, c.want)
		}
	}
	m := &Message{Flags: Request | Proxiable, Code: AuthenticationInfo, App: S6a, HopByHop: 1, EndToEnd: 2,
		AVPs: []AVP{Text(UserName, "1")}}
	want := octets("01 000020 c0 00013e 01000023 00000001 00000002  00000001 40 000009 31000000")
	if got := m.Bytes(); !bytes.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
	if got := PLMN("00101").Data; !bytes.Equal(got, []byte{0x00, 0xf1, 0x10}) {
		t.Errorf("PLMN 00101 is %x", got)
	}
	if got := PLMN("310410").Data; !bytes.Equal(got, []byte{0x13, 0x00, 0x14}) {
		t.Errorf("PLMN 310410 is %x", got)
	}
}

func TestParseRefuses(t *testing.T) {
	good := octets("01 000020 c0 00013e 01000023 00000001 00000002  00000001 40 000009 31000000")
	if m, err := Parse(good); err != nil || string(m.Data(UserName)) != "1" {
		t.Fatalf("%+v, %v", m, err)
	}
	for name, change := range map[string]func(b []byte) []byte{
		"empty":                   func([]byte) []byte { return nil },
		"another version":         func(b []byte) []byte { b[0] = 2; return b },
		"another length":          func(b []byte) []byte { b[3] = 0x24; return b },
		"cut":                     func(b []byte) []byte { return b[:31] },
		"an AVP of length 7":      func(b []byte) []byte { b[27] = 7; return b },
		"an AVP of length 0":      func(b []byte) []byte { b[27] = 0; return b },
		"an AVP too long":         func(b []byte) []byte { b[27] = 13; return b },
		"an AVP's vendor cut off": func(b []byte) []byte { b[24] |= 0x80; return b },
		"half an AVP":             func(b []byte) []byte { b = append(b, 0, 0, 0, 1); b[3] = 0x24; return b },
	} {
		if m, err := Parse(change(bytes.Clone(good))); err == nil {
			t.Errorf("%s: %+v", name, m)
		}
	}
}

func TestFault(t *testing.T) {
	p := &Peer{Host: "hss", Realm: "r"}
	request := p.AIR("r", "001010000000001", 1, nil)
	result := Group(ExperimentalResult, Number(VendorID, ThreeGPP), Number(ExperimentalResultCode, 5420))
	state := Number(AuthSessionState, 1)
	for _, c := range []struct {
		name, fault string
		answer      *Message
		flags       byte
	}{
		{"good", "", p.Answer(request, result, state), 0},
		{"no state", "AVP {0 277}", p.Answer(request, result), 0},
		{"a state that is maintained", "NO_STATE", p.Answer(request, result, Number(AuthSessionState, 0)), 0},
		{"no result", "0 Result-Code", p.Answer(request, state), 0},
		{"two results", "1 Result-Code and 1", p.Answer(request, state, result, Number(ResultCode, 2001)), 0},
		{"a result without a vendor", "{0 266}",
			p.Answer(request, state, Group(ExperimentalResult, Number(ExperimentalResultCode, 5420))), 0},
		{"the E bit", "flags 60", p.Answer(request, state, result), Error},
		{"no E bit", "3004", p.Answer(request, state, Number(ResultCode, 3004)), 0},
		{"busy", "", p.Answer(request, state, Number(ResultCode, 3004)), Error},
		{"a vector without RAND", "{10415 1447}",
			p.Answer(request, state, Number(ResultCode, 2001), Group(AuthInfo, Group(EUTRANVector))), 0},
		{"ULA without flags", "ULA-Flags", p.Answer(p.ULR("r", "1", "1", nil, ""), state, Number(ResultCode, 2001)), 0},
		{"an M bit on ours", "flags 40",
			p.Answer(request, state, result, AVP{BindingControl, mandatory, []byte{0, 0, 0, 2}}), 0},
	} {
		c.answer.Flags |= c.flags
		if got := Fault(c.answer); (got == "") != (c.fault == "") || !strings.Contains(got, c.fault) {
			t.Errorf("%s: %q, want %q", c.name, got, c.fault)
		}
	}
}

// serve is the other side: it answers CER with a result, and then as f says.
func serve(t *testing.T, result uint32, f func(p *Peer, m *Message)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		p := &Peer{Host: "server", Realm: "r", conn: conn, left: make(chan struct{}),
			waiting: map[uint32]chan *Message{}}
		p.handle = func(p *Peer, m *Message) {
			if m.Code == capabilitiesExchange {
				p.Send(p.Answer(m, Number(ResultCode, result)))
			} else {
				f(p, m)
			}
		}
		p.read()
	}()
	return l.Addr().String()
}

func TestPeer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := Dial(ctx, serve(t, 3010, nil), "mme", "r", nil); err == nil || !strings.Contains(err.Error(), "3010") {
		t.Errorf("a refused CER: %v", err)
	}
	asked := make(chan *Message, 1)
	address := serve(t, 2001, func(p *Peer, m *Message) {
		switch string(m.Data(UserName)) {
		case "1": // asks first itself, and answers twice
			if _, err := p.Ask(ctx, p.Start(S6a, 317, "r", "1")); err != nil {
				t.Error(err)
			}
			p.Send(p.Answer(m, Number(ResultCode, 2001)))
			p.Send(p.Answer(m, Number(ResultCode, 2001)))
		case "2":
			p.conn.Close()
		}
	})
	p, err := Dial(ctx, address, "mme", "r", func(p *Peer, m *Message) {
		asked <- m
		p.Send(p.Answer(m, Number(ResultCode, 2001)))
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		a, err := p.Ask(ctx, p.AIR("r", "1", 1, nil))
		if err != nil || a.Result() != 2001 || string(a.Data(OriginHost)) != "server" {
			t.Fatalf("%+v, %v", a, err)
		}
		if m := <-asked; m.Code != 317 {
			t.Errorf("%+v", m)
		}
	}
	short, cancelShort := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancelShort()
	if _, err := p.Ask(short, p.AIR("r", "3", 1, nil)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
	if _, err := p.Ask(ctx, p.AIR("r", "2", 1, nil)); !errors.Is(err, ErrGone) {
		t.Errorf("after the other side has gone: %v", err)
	}
	p.Close()
}

// Whatever is parsed is made again, and the same.
func FuzzParse(f *testing.F) {
	p := &Peer{Host: "mme", Realm: "r"}
	for _, m := range []*Message{p.AIR("r", "1", 1, make([]byte, 30), Features(), PLMN("00101")),
		p.ULR("r", "1", "1", []byte("x"), "a"), p.MAR(SWx, "r", "1", 1, nil)} {
		f.Add(m.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			return
		}
		Fault(m)
		m.All(AuthInfo, EUTRANVector, RAND)
		again, err := Parse(m.Bytes())
		if err != nil || !bytes.Equal(again.Bytes(), m.Bytes()) || len(again.AVPs) != len(m.AVPs) {
			t.Errorf("%x is made again as %x: %v", b, m.Bytes(), err)
		}
	})
}
