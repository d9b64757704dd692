// Package n5geir is the equipment identity register of a 5G core (N5g-eir, 3GPP TS 29.511), for AMFs: the same answers
// as CheckEquipment's.
package n5geir

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"

	kmev1 "github.com/kmehsm/kmehsm/api/kme/v1"
	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/kme"
)

// path is where the one resource is (TS 29.511 clause 6.1.3).
const path = "/n5g-eir-eic/v1/equipment-status"

// A Check answers or refuses the sender of a request: api.Handler.CheckEquipment.
type Check func(*http.Request, *kmev1.CheckEquipmentRequest) (*kmev1.CheckEquipmentResponse, error)

// Options are what Handler serves with.
type Options struct {
	Check  Check
	Tokens *Tokens // optional: each request needs one; without, its certificate is enough
	// Refused is told of each request that Tokens refuse, and why.
	Refused func(*http.Request, error)
}

// Handler serves N5g-eir.
func Handler(o Options) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		status, problem := o.answer(r)
		var body any = map[string]string{"status": status}
		code, kind := http.StatusOK, "application/json"
		if problem != nil {
			body, code, kind = problem, problem.Status, "application/problem+json"
			for key, value := range problem.header {
				w.Header().Set(key, value)
			}
		}
		w.Header().Set("Content-Type", kind)
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(body)
	})
}

// A problem is a ProblemDetails (TS 29.571 clause 5.2.4.1). Causes are those of TS 29.500 table 5.2.7.2-1, and of TS
// 29.511 clause 6.1.7.3.
type problem struct {
	Status int            `json:"status"`
	Cause  string         `json:"cause,omitempty"`
	Detail string         `json:"detail,omitempty"`
	Params []invalidParam `json:"invalidParams,omitempty"`

	header map[string]string
}

type invalidParam struct {
	Param  string `json:"param"`
	Reason string `json:"reason,omitempty"`
}

// answer answers a request even if that panics: net/http would end the connection.
func (o Options) answer(r *http.Request) (status string, p *problem) {
	var broken error
	defer func() {
		if broken != nil {
			status, p = "", refused(broken)
		}
	}()
	defer panics.Recover(&broken)
	switch {
	case r.URL.Path != path:
		return "", &problem{Status: http.StatusNotFound, Cause: "RESOURCE_URI_STRUCTURE_NOT_FOUND"}
	case r.Method != http.MethodGet:
		return "", &problem{Status: http.StatusMethodNotAllowed, header: map[string]string{"Allow": "GET"}}
	}
	if p, why := o.Tokens.check(r.Header); p != nil {
		o.Refused(r, why)
		return "", p
	}
	q, p := parse(r.URL.RawQuery)
	if p != nil {
		return "", p
	}
	a, err := o.Check(r, q)
	if err != nil {
		return "", refused(err)
	}
	return a.Status.String(), nil
}

var (
	gpsi     = regexp.MustCompile(`^(msisdn-[0-9]{5,15}|extid-[^@]+@[^@]+)$`)
	features = regexp.MustCompile(`^[A-Fa-f0-9]*$`)
)

// parse parses a query. About a device without an IMEI, nothing is known. If the subscription has no IMSI, only what is
// known about the device counts.
func parse(query string) (*kmev1.CheckEquipmentRequest, *problem) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, &problem{Status: http.StatusBadRequest, Cause: "INVALID_MSG_FORMAT",
			Detail: "the query cannot be parsed"}
	}
	q, other := new(kmev1.CheckEquipmentRequest), false
	for _, p := range []struct {
		name      string
		mandatory bool
		check     func(value string) error
	}{
		{name: "pei", mandatory: true, check: func(pei string) error {
			imei, err := kme.ParsePEI(pei)
			if other = errors.Is(err, kme.ErrOtherIdentity); other {
				return nil
			}
			q.Imei = imei.String()
			return err
		}},
		{name: "supi", check: func(supi string) error {
			imsi, err := kme.ParseSUPI(supi)
			if errors.Is(err, kme.ErrOtherIdentity) {
				return nil
			}
			q.Imsi = imsi.String()
			return err
		}},
		{name: "gpsi", check: matches(gpsi, "msisdn-, or extid- with @")},
		{name: "supported-features", check: matches(features, "hexadecimal")},
	} {
		given := values[p.name]
		delete(values, p.name)
		cause, err := "OPTIONAL_QUERY_PARAM_INCORRECT", error(nil)
		if p.mandatory {
			cause = "MANDATORY_QUERY_PARAM_INCORRECT"
		}
		switch {
		case len(given) == 1:
			err = p.check(given[0])
		case len(given) > 1:
			err = errors.New("it is there more than once")
		case p.mandatory:
			cause, err = "MANDATORY_QUERY_PARAM_MISSING", errors.New("it is not there")
		}
		if err != nil {
			return nil, invalid(cause, p.name, err.Error())
		}
	}
	for name := range values {
		return nil, invalid("INVALID_QUERY_PARAM", name, "it is none of pei, supi, gpsi and supported-features")
	}
	if other {
		return nil, unknown()
	}
	return q, nil
}

func matches(pattern *regexp.Regexp, form string) func(string) error {
	return func(value string) error {
		if pattern.MatchString(value) {
			return nil
		}
		return fmt.Errorf("its form is %s", form)
	}
}

func invalid(cause, name, reason string) *problem {
	return &problem{Status: http.StatusBadRequest, Cause: cause, Params: []invalidParam{{Param: name, Reason: reason}}}
}

func unknown() *problem {
	return &problem{Status: http.StatusNotFound, Cause: "ERROR_EQUIPMENT_UNKNOWN"}
}

// problems are those of the refusals that there are.
var problems = map[kme.Reason]problem{
	kme.CallerNotAllowed:     {Status: http.StatusForbidden},
	kme.Overloaded:           {Status: http.StatusServiceUnavailable, Cause: "NF_CONGESTION"},
	kme.HSMUnavailable:       {Status: http.StatusServiceUnavailable},
	kme.DirectoryUnavailable: {Status: http.StatusServiceUnavailable},
	kme.StoreUnavailable:     {Status: http.StatusServiceUnavailable},
	kme.RolledBack:           {Status: http.StatusInternalServerError, Cause: "SYSTEM_FAILURE"},
	kme.Damaged:              {Status: http.StatusInternalServerError, Cause: "SYSTEM_FAILURE"},
}

// refused tells an AMF what it may know.
func refused(err error) *problem {
	r, ok := errors.AsType[*binding.Refusal](err)
	if !ok {
		return &problem{Status: http.StatusInternalServerError, Cause: "UNSPECIFIED_NF_FAILURE"}
	}
	if r.Reason == kme.UnknownDevice {
		return unknown()
	}
	p := problems[r.Reason]
	p.Status, p.Detail = cmp.Or(p.Status, http.StatusInternalServerError), r.Message
	return &p
}
