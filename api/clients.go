package api

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/time/rate"

	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/kme"
)

// A Role is what a client may do.
type Role string

const (
	RoleHSS     Role = "hss"        // what an attach needs
	RoleEIR     Role = "eir"        // ask whether a device may be served
	RoleAdmin   Role = "admin"      // see, open and revoke
	RoleMonitor Role = "monitor"    // see who is bound
	RoleMetrics Role = "metrics"    // read GET /metrics
	RoleExport  Role = "kme-export" // be answered the KME by EstablishKME
)

// roles are all of them. A client with any role may ask whether the service is ready.
var roles = []Role{RoleHSS, RoleEIR, RoleAdmin, RoleMonitor, RoleMetrics, RoleExport}

// allowed has the roles of each method, of which a client needs one. Nobody may call a method that is not here.
var allowed = map[string][]Role{
	kmev1connect.KeyServicePrepareVectorProcedure:        {RoleHSS},
	kmev1connect.KeyServiceEstablishKMEProcedure:         {RoleHSS},
	kmev1connect.KeyServiceReportAuthenticationProcedure: {RoleHSS},
	kmev1connect.KeyServiceRestoreRANDProcedure:          {RoleHSS},
	kmev1connect.KeyServiceCheckEquipmentProcedure:       {RoleHSS, RoleEIR},
	kmev1connect.KeyServiceGetBindingProcedure:           {RoleHSS, RoleAdmin, RoleMonitor},
	kmev1connect.KeyServiceListBindingsProcedure:         {RoleAdmin, RoleMonitor},
	kmev1connect.KeyServiceOpenProvisioningProcedure:     {RoleAdmin},
	kmev1connect.KeyServiceRevokeBindingProcedure:        {RoleAdmin},
	kmev1connect.KeyServiceStreamProcedure:               {RoleHSS, RoleEIR, RoleAdmin, RoleMonitor}, // as its calls
}

// A Client may call the service. It is known by its certificate or its user.
type Client struct {
	Name  string   `yaml:"name"`
	SAN   string   `yaml:"san"`   // a DNS name or URI of its certificate
	UID   *int     `yaml:"uid"`   // the user at the other end of the Unix socket
	Roles []Role   `yaml:"roles"` // at least one
	PLMNs []string `yaml:"plmns"` // MCC and MNC, whose IMSIs it may name; or all; none for metrics alone
	Rate  float64  `yaml:"rate"`  // calls a second, which may come all at once; 0 for no limit

	// Origins from which devices may be provisioned: home (the default), any, MCC and MNC, names of hosts, or *.SUFFIX.
	ProvisionFrom []string `yaml:"provision_from"`

	limit *rate.Limiter
	calls chan struct{} // has one for each that is under way
	known plmns
	view  binding.BindingQuery // for the IMSIs that it may name
}

// plmns are all PLMNs that a configuration names, for any client. An MNC has two or three digits, and an IMSI does not
// say how many: its PLMN is the longest one here that it begins with.
type plmns map[string]bool

// of is the PLMN of an IMSI; empty if it is not here.
func (k plmns) of(imsi string) string {
	for _, n := range []int{6, 5} {
		if len(imsi) >= n && k[imsi[:n]] {
			return imsi[:n]
		}
	}
	return ""
}

// ofName are the PLMNs that a node's name may mean: in a name, an MNC of two digits has a 0 before it.
func (k plmns) ofName(origin string) []string {
	if !ofPLMN.MatchString(origin) {
		return nil
	}
	tail := origin[len(origin)-len("mncMMM.mccCCC.3gppnetwork.org"):]
	mnc, mcc := tail[3:6], tail[10:13]
	if long := mcc + mnc; mnc[0] != '0' || k[long] {
		return []string{long}
	}
	return []string{mcc + mnc, mcc + mnc[1:]}
}

// view is the view of a client that may name some PLMNs. It excludes IMSIs of longer PLMNs that the client may not
// name.
func (k plmns) view(some []string) (v binding.BindingQuery) {
	if slices.Contains(some, all) {
		return v
	}
	v.Within = some
	for p := range k {
		if len(p) == 6 && slices.Contains(some, p[:5]) && !slices.Contains(some, p) {
			v.Without = append(v.Without, p)
		}
	}
	slices.Sort(v.Without)
	return v
}

// all stands for every PLMN.
const all = "all"

// home stands for the origins of the IMSI's own PLMN, by their names (3GPP TS 23.003 clause 19.2), and for a caller's
// only peer; any for every origin.
const (
	home     = "home"
	anywhere = "any"
)

// Clients says who may do what. It is immutable.
type Clients struct {
	bySAN map[string]*Client
	byUID map[int]*Client
}

// ClientErrors are what is wrong with a list of clients, of each that is not good.
type ClientErrors []ClientError

// A ClientError is what is wrong with one of a list.
type ClientError struct {
	Index int
	error
}

func (e ClientErrors) Error() string {
	lines := make([]string, len(e))
	for i, one := range e {
		lines[i] = one.Error()
	}
	return strings.Join(lines, "\n")
}

// NewClients checks a list of clients. Its error is ClientErrors.
func NewClients(list []Client) (*Clients, error) {
	c := &Clients{bySAN: map[string]*Client{}, byUID: map[int]*Client{}}
	var wrong ClientErrors
	for i := range list {
		e := &list[i]
		for _, err := range c.add(e) {
			wrong = append(wrong, ClientError{Index: i, error: fmt.Errorf("client %q: %w", cmp.Or(e.Name, e.SAN), err)})
		}
	}
	if len(wrong) > 0 {
		return nil, wrong
	}
	known := plmns{}
	for _, e := range list {
		for _, p := range slices.Concat(e.PLMNs, e.ProvisionFrom) {
			if isPLMN(p) {
				known[p] = true
			}
		}
	}
	for i := range list {
		list[i].known, list[i].view = known, known.view(list[i].PLMNs)
	}
	return c, nil
}

// add takes a client up, and says all that is wrong with it.
func (c *Clients) add(e *Client) (wrong []error) {
	no := func(format string, args ...any) { wrong = append(wrong, fmt.Errorf(format, args...)) }
	if e.Name == "" {
		no("it has no name, which the log calls it by")
	}
	switch {
	case (e.SAN == "") == (e.UID == nil):
		no("it has either a san or a uid")
	case e.UID != nil && (*e.UID < 0 || *e.UID >= math.MaxUint32): // the last is nobody's (chown(2))
		no("uid is a number from 0 to %d, not %d", uint32(math.MaxUint32-1), *e.UID)
	case e.SAN != "" && c.bySAN[e.SAN] != nil || e.UID != nil && c.byUID[*e.UID] != nil:
		no("another client has the same san or uid")
	case e.SAN != "":
		c.bySAN[e.SAN] = e
	default:
		c.byUID[*e.UID] = e
	}
	if !(e.Rate >= 0 && e.Rate <= math.MaxInt32) {
		no("rate is a number of calls a second, or 0 for no limit, not %v", e.Rate)
	}
	if len(e.Roles) == 0 {
		no("it has no roles")
	}
	if len(e.PLMNs) == 0 && !slices.Equal(e.Roles, []Role{RoleMetrics}) { // a client that names no IMSI needs none
		no("it has no plmns: name them, or write [all]")
	}
	for _, r := range e.Roles {
		if !slices.Contains(roles, r) {
			no("roles has %q, which is none of hss, eir, admin, monitor, metrics and kme-export", r)
		}
	}
	for _, p := range e.PLMNs {
		if p != all && !isPLMN(p) {
			no("plmns has %q, which is neither all nor a PLMN: MCC and MNC, 5 or 6 digits", p)
		}
	}
	for i, p := range e.ProvisionFrom {
		o, err := kme.ParseOrigin(p)
		name := strings.TrimPrefix(o.String(), "*.")
		if err != nil || name == "" || strings.Contains(name, "*") || isDigits(name) && !isPLMN(p) {
			no("provision_from has %q, which is none of home, any, MCC and MNC, the name of a host and *.SUFFIX", p)
		}
		e.ProvisionFrom[i] = o.String()
	}
	if len(e.ProvisionFrom) == 0 {
		e.ProvisionFrom = []string{home}
	}
	if e.Rate > 0 {
		e.limit = rate.NewLimiter(rate.Limit(e.Rate), max(int(e.Rate), 1))
	}
	e.calls = make(chan struct{}, maxCalls)
	return wrong
}

// OtherUsers says whether a client is known by another user than own: then the socket must be open for others.
func (c *Clients) OtherUsers(own int) bool {
	for uid := range c.byUID {
		if uid != own {
			return true
		}
	}
	return false
}

// of is the client of a caller; nil if it is none. A certificate's first known name counts. A CA may let applicants
// choose names of one kind: so what looks like a URI is no DNS name, and the other way round.
func (c *Clients) of(certificate *x509.Certificate, uid int) *Client {
	if certificate == nil {
		return c.byUID[uid]
	}
	for _, name := range certificate.DNSNames {
		if e := c.bySAN[name]; e != nil && !strings.Contains(name, ":") {
			return e
		}
	}
	for _, uri := range certificate.URIs {
		if e := c.bySAN[uri.String()]; e != nil && uri.IsAbs() {
			return e
		}
	}
	return nil
}

// as is the first of these roles that a client has; empty if it has none.
func (e *Client) as(some ...Role) Role {
	for _, r := range some {
		if e != nil && slices.Contains(e.Roles, r) {
			return r
		}
	}
	return ""
}

// origin gives the origin that a client names for an IMSI, and whether devices may be provisioned from there.
func (e *Client) origin(name, imsi string, declined bool) (o binding.Origin, err error) {
	if o.Name, err = kme.ParseOrigin(name); err != nil {
		return o, malformed(err)
	}
	switch {
	case declined:
		o.Provisioning = binding.Declined
	case slices.ContainsFunc(e.ProvisionFrom, func(p string) bool { return e.provisions(p, o.Name.String(), imsi) }):
		o.Provisioning = binding.Allowed
	}
	return o, nil
}

func (e *Client) provisions(from, origin, imsi string) bool {
	switch suffix, ok := strings.CutPrefix(from, "*"); {
	case ok:
		return strings.HasSuffix(origin, suffix)
	case from == home:
		return origin == "" || e.isHome(origin, imsi)
	case isPLMN(from):
		return slices.Contains(e.known.ofName(origin), from)
	}
	return from == anywhere || from == origin
}

// isHome says whether a name is of the IMSI's own PLMN.
func (e *Client) isHome(origin, imsi string) bool {
	own := e.known.of(imsi)
	return slices.ContainsFunc(e.known.ofName(origin), func(p string) bool {
		return p == own || own == "" && strings.HasPrefix(imsi, p)
	})
}

func isDigits(s string) bool { return strings.Trim(s, "0123456789") == "" }

// isPLMN says whether a text is MCC and MNC.
func isPLMN(s string) bool { return (len(s) == 5 || len(s) == 6) && isDigits(s) }

// ofPLMN is the end of the names of a PLMN's nodes. Its MNC always has three digits.
var ofPLMN = regexp.MustCompile(`\.mnc[0-9]{3}\.mcc[0-9]{3}\.3gppnetwork\.org$`)

// tooMany says whether a client calls more often than it may.
func (e *Client) tooMany() bool { return e != nil && e.limit != nil && !e.limit.Allow() }

// maxCalls of one client are under way at once, over all its connections and streams: so it bounds the memory that one
// client can take. It is more than a store answers in half a second. Calls for the HSM have a bound of their own.
const maxCalls = 4096

// begin takes a place for a call, to be given back by end, or refuses the call.
func (e *Client) begin() error {
	select {
	case e.calls <- struct{}{}:
		return nil
	default:
		return overloaded("this client has as many calls under way as it may have")
	}
}

func (e *Client) end() { <-e.calls }

// notAllowed is the one answer, whatever the caller lacks.
func notAllowed() *binding.Refusal {
	return &binding.Refusal{Reason: kme.CallerNotAllowed, Message: "this client may not do that"}
}
