import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

/** Creates users with Java's own client, which offers HTTP/2 with each request until a server has taken it. */
public class SignUps {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (int number = 0; number < Integer.parseInt(arguments[1]); number++) {
            String name = "java_" + number;
            String body = ("{'username': '%s', 'password': 'correct horse', 'full_name': 'Alice Liddell', "
                + "'email': '%s@example.com'}").formatted(name, name).replace('\'', '"');
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
                .header("Content-Type", "application/json")
                .header("X-Request-ID", name)
                .POST(number % 2 == 0
                    ? BodyPublishers.ofString(body)
                    : BodyPublishers.fromPublisher(BodyPublishers.ofString(body)))  // of no known length: in chunks
                .build();
            var response = client.send(request, BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.headers().firstValue("x-request-id").orElse("-"));
        }
    }
}
