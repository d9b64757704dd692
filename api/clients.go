package api

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/kmehsm/kmehsm/api/kme/v1/kmev1connect"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/kme"
)

// A Role is what a client may do.
type Role string

const (
	RoleHSS     Role = "hss"        // what an attach needs
	RoleAdmin   Role = "admin"      // see, open and revoke
	RoleMonitor Role = "monitor"    // see
	RoleExport  Role = "kme-export" // be answered the KME by EstablishKME
)

// allowed has the roles that each method wants one of. A method that is not here is nobody's.
var allowed = map[string][]Role{
	kmev1connect.KeyServicePrepareVectorProcedure:        {RoleHSS},
	kmev1connect.KeyServiceEstablishKMEProcedure:         {RoleHSS},
	kmev1connect.KeyServiceEstablishKMEsProcedure:        {RoleHSS},
	kmev1connect.KeyServiceReportAuthenticationProcedure: {RoleHSS},
	kmev1connect.KeyServiceRestoreRANDProcedure:          {RoleHSS},
	kmev1connect.KeyServiceGetBindingProcedure:           {RoleHSS, RoleAdmin, RoleMonitor},
	kmev1connect.KeyServiceListBindingsProcedure:         {RoleAdmin, RoleMonitor},
	kmev1connect.KeyServiceOpenProvisioningProcedure:     {RoleAdmin},
	kmev1connect.KeyServiceRevokeBindingProcedure:        {RoleAdmin},
}

// A Client is who may call, by certificate or by user.
type Client struct {
	Name  string   `yaml:"name"`
	SAN   string   `yaml:"san"`   // a DNS name or URI of its certificate
	UID   *int     `yaml:"uid"`   // the user at the other end of the Unix socket
	Roles []Role   `yaml:"roles"` // at least one
	PLMNs []string `yaml:"plmns"` // MCC and MNC, whose IMSIs it may name; or all
	Rate  float64  `yaml:"rate"`  // calls a second, and as many at once; 0 for no limit

	// Origins from which devices may be provisioned: home (the default), any, MCC and MNC, names of hosts, or *.SUFFIX.
	ProvisionFrom []string `yaml:"provision_from"`

	limit *rate.Limiter
}

// all stands for every PLMN.
const all = "all"

// home stands for the origins of the IMSI's own PLMN, by their names (3GPP TS 23.003 clause 19.2), and for a caller's
// only peer; any for every origin.
const (
	home     = "home"
	anywhere = "any"
)

// Clients says who may do what. It does not change.
type Clients struct {
	bySAN map[string]*Client
	byUID map[int]*Client
	// anyCertificate is who has a certificate that is verified, and is not named.
	anyCertificate *Client
}

// AnyCertificate makes every client with a certificate one for all PLMNs.
func (c *Clients) AnyCertificate(roles ...Role) *Clients {
	c.anyCertificate = &Client{Name: "any certificate", Roles: roles, PLMNs: []string{all}, ProvisionFrom: []string{home}}
	return c
}

// NewClients checks a list of clients.
func NewClients(list []Client) (*Clients, error) {
	c := &Clients{bySAN: map[string]*Client{}, byUID: map[int]*Client{}}
	for i := range list {
		e := &list[i]
		if err := c.add(e); err != nil {
			return nil, fmt.Errorf("client %q: %w", cmp.Or(e.Name, e.SAN), err)
		}
	}
	return c, nil
}

func (c *Clients) add(e *Client) error {
	switch {
	case e.Name == "":
		return errors.New("it has no name, which the log calls it by")
	case (e.SAN == "") == (e.UID == nil):
		return errors.New("it has either a san or a uid")
	case e.UID != nil && *e.UID < 0:
		return fmt.Errorf("uid is a number from 0 on, not %d", *e.UID)
	case !(e.Rate >= 0 && e.Rate <= math.MaxInt32):
		return fmt.Errorf("rate is a number of calls a second, or 0 for no limit, not %v", e.Rate)
	case len(e.Roles) == 0:
		return errors.New("it has no roles")
	case len(e.PLMNs) == 0:
		return errors.New("it has no plmns: name them, or write [all]")
	case e.SAN != "" && c.bySAN[e.SAN] != nil || e.UID != nil && c.byUID[*e.UID] != nil:
		return errors.New("another client has the same san or uid")
	}
	for _, r := range e.Roles {
		if !slices.Contains([]Role{RoleHSS, RoleAdmin, RoleMonitor, RoleExport}, r) {
			return fmt.Errorf("there is no role %q: hss, admin, monitor, kme-export", r)
		}
	}
	for _, p := range e.PLMNs {
		if p != all && !isPLMN(p) {
			return fmt.Errorf("%q is no PLMN: MCC and MNC, 5 or 6 digits, or all", p)
		}
	}
	for i, p := range e.ProvisionFrom {
		o, err := kme.ParseOrigin(p)
		name := strings.TrimPrefix(o.String(), "*.")
		if err != nil || name == "" || strings.Contains(name, "*") || isDigits(name) && !isPLMN(p) {
			return fmt.Errorf("provision_from has %q, which is none of home, any, MCC and MNC, the name of a host and *.SUFFIX", p)
		}
		e.ProvisionFrom[i] = o.String()
	}
	if len(e.ProvisionFrom) == 0 {
		e.ProvisionFrom = []string{home}
	}
	if e.Rate > 0 {
		e.limit = rate.NewLimiter(rate.Limit(e.Rate), max(int(e.Rate), 1))
	}
	if e.SAN != "" {
		c.bySAN[e.SAN] = e
	} else {
		c.byUID[*e.UID] = e
	}
	return nil
}

// OtherUsers says whether clients are known by another user than own, and so whether those are to reach the socket.
func (c *Clients) OtherUsers(own int) bool {
	for uid := range c.byUID {
		if uid != own {
			return true
		}
	}
	return false
}

// of is who is at the other end; nil if it is nobody who may call. Of a certificate the first name that is known counts.
func (c *Clients) of(certificate *x509.Certificate, uid int) *Client {
	if certificate == nil {
		return c.byUID[uid]
	}
	for _, name := range certificate.DNSNames {
		if e := c.bySAN[name]; e != nil {
			return e
		}
	}
	for _, uri := range certificate.URIs {
		if e := c.bySAN[uri.String()]; e != nil {
			return e
		}
	}
	return c.anyCertificate
}

func (e *Client) has(roles ...Role) bool {
	return e != nil && slices.ContainsFunc(roles, func(r Role) bool { return slices.Contains(e.Roles, r) })
}

// may says whether a client may name an IMSI.
func (e *Client) may(imsi string) bool {
	return e != nil && slices.ContainsFunc(e.PLMNs, func(p string) bool { return p == all || strings.HasPrefix(imsi, p) })
}

// origin is who asked a client for an IMSI, and whether devices may be provisioned from there.
func (e *Client) origin(name, imsi string, declined bool) (o binding.Origin, err error) {
	if o.Name, err = kme.ParseOrigin(name); err != nil {
		return o, &binding.Refusal{Reason: kme.Malformed, Message: err.Error()}
	}
	switch {
	case declined:
		o.Provisioning = binding.Declined
	case slices.ContainsFunc(e.ProvisionFrom, func(p string) bool { return provisions(p, o.Name.String(), imsi) }):
		o.Provisioning = binding.Allowed
	}
	return o, nil
}

func provisions(from, origin, imsi string) bool {
	switch suffix, ok := strings.CutPrefix(from, "*"); {
	case ok:
		return strings.HasSuffix(origin, suffix)
	case from == home:
		return origin == "" || ofPLMN.MatchString(origin) && isHome(origin, imsi)
	case isPLMN(from):
		return ofPLMN.MatchString(origin) && slices.Contains(plmns(origin), from)
	}
	return from == anywhere || from == origin
}

func isDigits(s string) bool { return strings.Trim(s, "0123456789") == "" }

// isPLMN says whether a text is MCC and MNC.
func isPLMN(s string) bool { return (len(s) == 5 || len(s) == 6) && isDigits(s) }

// ofPLMN is how the names of a PLMN's nodes end; its MNC has three digits always.
var ofPLMN = regexp.MustCompile(`\.mnc[0-9]{3}\.mcc[0-9]{3}\.3gppnetwork\.org$`)

// plmns are those that a name ends with: an MNC of two digits has a 0 before it in a name.
func plmns(origin string) []string {
	tail := origin[len(origin)-len("mncMMM.mccCCC.3gppnetwork.org"):]
	mnc, mcc := tail[3:6], tail[10:13]
	if mnc[0] == '0' {
		return []string{mcc + mnc, mcc + mnc[1:]}
	}
	return []string{mcc + mnc}
}

// isHome says whether an IMSI begins with the PLMN that a name ends with.
func isHome(origin, imsi string) bool {
	return slices.ContainsFunc(plmns(origin), func(p string) bool { return strings.HasPrefix(imsi, p) })
}

type (
	clientKey struct{}
	uidKey    struct{}
)

// ConnContext remembers the user at the other end of a Unix socket. It is for http.Server.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	uid := -1
	if u, ok := c.(*net.UnixConn); ok {
		if raw, err := u.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) {
				if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
					uid = int(cred.Uid)
				}
			})
		}
	}
	return context.WithValue(ctx, uidKey{}, uid)
}

// identify puts the client into the context of each request.
func identify(clients *atomic.Pointer[Clients], next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var certificate *x509.Certificate
		if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
			certificate = r.TLS.VerifiedChains[0][0]
		}
		uid, ok := r.Context().Value(uidKey{}).(int)
		if !ok {
			uid = -1
		}
		client := clients.Load().of(certificate, uid)
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), clientKey{}, client)))
	})
}

func clientOf(ctx context.Context) *Client {
	c, _ := ctx.Value(clientKey{}).(*Client)
	return c
}

// tooMany says whether a client calls more often than it may.
func (e *Client) tooMany() bool { return e != nil && e.limit != nil && !e.limit.Allow() }

// notAllowed is one answer, whatever the caller lacks.
func notAllowed() *binding.Refusal {
	return &binding.Refusal{Reason: kme.CallerNotAllowed, Message: "this client may not do that"}
}
