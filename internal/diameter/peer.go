package diameter

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A Peer is one connection to a Diameter node, which knows it by its name. It may be used concurrently.
type Peer struct {
	Host, Realm string

	conn   net.Conn
	handle func(p *Peer, request *Message)
	left   chan struct{} // closed when the connection has ended

	mu      sync.Mutex
	next    uint32                   // guarded by mu: of Hop-by-Hop and End-to-End Identifiers
	waiting map[uint32]chan *Message // guarded by mu, by Hop-by-Hop Identifier
	sending sync.Mutex
}

// Dial connects as a peer of this name. Requests are given to handle, each in a goroutine of its own; nil: to nobody.
func Dial(ctx context.Context, address, host, realm string, handle func(p *Peer, request *Message)) (*Peer, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	p := &Peer{Host: host, Realm: realm, conn: conn, handle: handle, left: make(chan struct{}),
		waiting: map[uint32]chan *Message{}}
	p.next = uint32(time.Now().UnixNano())
	go p.read()
	cer := &Message{Flags: Request, Code: capabilitiesExchange, AVPs: p.capabilities()}
	cea, err := p.Ask(ctx, cer)
	if err == nil && cea.Result() != 2001 {
		err = fmt.Errorf("CEA has result %d", cea.Result())
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", host, err)
	}
	return p, nil
}

func (p *Peer) origin() []AVP { return []AVP{Text(OriginHost, p.Host), Text(OriginRealm, p.Realm)} }

func (p *Peer) capabilities() []AVP {
	avps := append(p.origin(), New(HostIPAddress, []byte{0, 1, 127, 0, 0, 1}), Number(VendorID, 0),
		Text(ProductName, "a test peer"),
		Number(InbandSecurityID, 0), Number(SupportedVendorID, ThreeGPP))
	for _, app := range []uint32{S6a, Cx, SWx, Wx, Zh, S13} {
		avps = append(avps, Group(VendorSpecificApp, Number(VendorID, ThreeGPP), Number(AuthApplicationID, app)))
	}
	return avps
}

func (p *Peer) read() {
	defer func() {
		p.conn.Close()
		close(p.left)
	}()
	for r := bufio.NewReader(p.conn); ; {
		m, err := read(r)
		if err != nil {
			return
		}
		switch {
		case m.Flags&Request == 0:
			p.mu.Lock()
			answer := p.waiting[m.HopByHop]
			delete(p.waiting, m.HopByHop)
			p.mu.Unlock()
			if answer != nil {
				answer <- m
			}
		case m.Code == deviceWatchdog:
			p.Send(p.Answer(m, Number(ResultCode, 2001)))
		case m.Code == disconnectPeer:
			p.Send(p.Answer(m, Number(ResultCode, 2001)))
			return
		case p.handle != nil:
			go p.handle(p, m)
		}
	}
}

// Send sends a message as it is.
func (p *Peer) Send(m *Message) error {
	p.sending.Lock()
	defer p.sending.Unlock()
	_, err := p.conn.Write(m.Bytes())
	return err
}

// Answer makes the answer to a request: with its Session-Id and Proxy-Info, and this peer's origin.
func (p *Peer) Answer(request *Message, avps ...AVP) *Message {
	a := &Message{Flags: request.Flags & Proxiable, Code: request.Code, App: request.App, HopByHop: request.HopByHop,
		EndToEnd: request.EndToEnd}
	a.AVPs = append(request.All(SessionID), p.origin()...)
	a.AVPs = append(append(a.AVPs, avps...), request.All(ProxyInfo)...)
	return a
}

// ErrGone is the error of a connection that has ended.
var ErrGone = errors.New("the peer has gone")

// Ask sends a request, and waits for its answer. It gives it a new Hop-by-Hop Identifier, and an End-to-End Identifier
// unless it has one.
func (p *Peer) Ask(ctx context.Context, m *Message) (*Message, error) {
	sent, answer := *m, make(chan *Message, 1)
	p.mu.Lock()
	p.next++
	if sent.HopByHop = p.next; m.EndToEnd == 0 {
		m.EndToEnd = p.next
		sent.EndToEnd = p.next
	}
	p.waiting[sent.HopByHop] = answer
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.waiting, sent.HopByHop)
		p.mu.Unlock()
	}()
	if err := p.Send(&sent); err != nil {
		return nil, err
	}
	select {
	case m := <-answer:
		return m, nil
	case <-p.left:
		return nil, ErrGone
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Close says goodbye, and ends the connection.
func (p *Peer) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	p.Ask(ctx, &Message{Flags: Request, Code: disconnectPeer, AVPs: append(p.origin(), Number(DisconnectCause, 2))})
	return p.conn.Close()
}

var sessions atomic.Uint32

// Start makes a request of an application, to a realm, about a user.
func (p *Peer) Start(app, code uint32, realm, user string, avps ...AVP) *Message {
	session := fmt.Sprintf("%s;%d;%d", p.Host, time.Now().Unix(), sessions.Add(1))
	m := &Message{Flags: Request | Proxiable, Code: code, App: app, AVPs: []AVP{Text(SessionID, session),
		Group(VendorSpecificApp, Number(VendorID, ThreeGPP), Number(AuthApplicationID, app)),
		Number(AuthSessionState, 1), Text(OriginHost, p.Host), Text(OriginRealm, p.Realm),
		Text(DestinationRealm, realm), Text(UserName, user)}}
	m.AVPs = append(m.AVPs, avps...)
	return m
}

// PLMN is Visited-PLMN-Id of an MCC and MNC (TS 29.272, 7.3.9).
func PLMN(digits string) AVP {
	d := append([]byte(digits), 0x3f)[:6] // a MNC of two digits is filled up with 0xf
	for i := range d {
		d[i] -= '0'
	}
	return New(VisitedPLMN, []byte{d[1]<<4 | d[0], d[5]<<4 | d[2], d[4]<<4 | d[3]})
}

// Features announces KME binding.
func Features() AVP {
	return Group(SupportedFeatures, Number(VendorID, Own), Number(FeatureListID, 1), Number(FeatureList, 1))
}

// AIR is an Authentication-Information-Request for so many E-UTRAN vectors. resync is RAND || AUTS, or nil.
func (p *Peer) AIR(realm, imsi string, vectors uint32, resync []byte, avps ...AVP) *Message {
	wanted := []AVP{Number(NumberOfVectors, vectors)}
	if resync != nil {
		wanted = append(wanted, New(ResyncInfo, resync))
	}
	return p.Start(S6a, AuthenticationInfo, realm, imsi, append(avps, Group(RequestedEUTRAN, wanted...))...)
}

// ULR is an Update-Location-Request of an initial attach. A payload goes with its attempt.
func (p *Peer) ULR(realm, imsi, imei string, payload []byte, attempt string, avps ...AVP) *Message {
	avps = append(avps, Number(RATType, 1004), Number(ULRFlags, 0x22),
		Group(TerminalInformation, Text(IMEI, imei), Text(SoftwareVersion, "01")))
	if payload != nil {
		avps = append(avps, Group(BindingRequest, New(BindingPayload, payload), Text(BindingAttempt, attempt)))
	}
	return p.Start(S6a, UpdateLocation, realm, imsi, avps...)
}

// MAR is a Multimedia-Auth-Request of Cx, SWx, Wx or Zh. resync is RAND || AUTS, or nil.
func (p *Peer) MAR(app uint32, realm, user string, items uint32, resync []byte) *Message {
	item := []AVP{Text(SIPScheme, "Digest-AKAv1-MD5")}
	if resync != nil {
		item = append(item, New(SIPAuthorization, resync))
	}
	return p.Start(app, MultimediaAuth, realm, user, Number(SIPNumberAuthItems, items), Group(SIPAuthDataItem, item...))
}

// required are the AVPs that an answer must have once: of RFC 6733, 7.2 with the E bit, else of its command.
var required = []ID{SessionID, AuthSessionState, OriginHost, OriginRealm}

// inGroups are the AVPs that must stand in a group, once each.
var inGroups = map[ID][]ID{
	EUTRANVector:       {RAND, XRES, AUTN, KASME},
	UTRANVector:        {RAND, XRES, AUTN, ConfidentialityKey, IntegrityKey},
	GERANVector:        {RAND, SRES, Kc},
	SupportedFeatures:  {VendorID, FeatureListID, FeatureList},
	ExperimentalResult: {VendorID, ExperimentalResultCode},
	BindingAnswer:      {BindingStatus},
	ProxyInfo:          {ProxyHost, ProxyState},
}

// Fault says what is wrong with an answer by TS 29.272, 29.229 and RFC 6733; empty: nothing.
func Fault(m *Message) string {
	base, experimental := m.All(ResultCode), m.All(ExperimentalResult)
	if len(base)+len(experimental) != 1 {
		return fmt.Sprintf("%d Result-Code and %d Experimental-Result", len(base), len(experimental))
	}
	if protocol := len(base) == 1 && m.Result()/1000 == 3; protocol != (m.Flags&Error != 0) {
		return fmt.Sprintf("result %d with flags %02x", m.Result(), m.Flags)
	}
	must := required
	if m.Code == MultimediaAuth {
		must = append([]ID{VendorSpecificApp}, must...)
	}
	for _, id := range must {
		if n := len(m.All(id)); n != 1 {
			return fmt.Sprintf("%d of AVP %v", n, id)
		}
	}
	if m.AVPs[0].ID != SessionID {
		return "Session-Id is not the first"
	}
	if state, _ := m.Number(AuthSessionState); state != 1 {
		return "Auth-Session-State is not NO_STATE_MAINTAINED"
	}
	if m.Code == UpdateLocation && m.Result() == 2001 && m.Data(ULAFlags) == nil {
		return "no ULA-Flags"
	}
	return faultIn(m.AVPs)
}

func faultIn(avps []AVP) string {
	for _, a := range avps {
		if want := New(a.ID, nil).Flags; a.Vendor == Own && a.Flags != want {
			return fmt.Sprintf("AVP %v has flags %02x", a.ID, a.Flags)
		}
		must := inGroups[a.ID]
		if must == nil && a.ID != AuthInfo {
			continue
		}
		in, err := ParseAVPs(a.Data)
		if err != nil {
			return err.Error()
		}
		for _, id := range must {
			if n := len(All(in, id)); n != 1 {
				return fmt.Sprintf("%d of AVP %v in %v", n, id, a.ID)
			}
		}
		if fault := faultIn(in); fault != "" {
			return fault
		}
	}
	return ""
}
